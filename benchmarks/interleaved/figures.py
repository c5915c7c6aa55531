"""From the rounds of a benchmark to figures: the hardware, medians, paired ratios, aims met or not."""

import json
import math
import os
import statistics
import subprocess
from pathlib import Path

OURS = "ternlm"
GIB = 2**30


def describe_hardware(threads: int) -> dict:
    """Return the processor, its cores and vector instructions, the memory, and the threads in use."""
    listed = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    said = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in listed.splitlines())}
    flags = said.get("Flags", "").split()
    return {
        "processor": f"{said.get('Model name', 'unknown')} (family {said.get('CPU family', '?')}, "
        f"model {said.get('Model', '?')})",
        "cores": len(os.sched_getaffinity(0)),
        "vector_instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "threads": threads,
    }


def state_of(result: dict) -> str:
    """Return the paragraph that says when, at which commit and on what was measured."""
    hardware = result["hardware"]
    return (
        f"{result['date']}, TernLM at {result['commit']}; {hardware['processor']}, {hardware['cores']} cores, "
        f"{hardware['memory_gib']} GiB, {' '.join(hardware['vector_instructions'])}; {hardware['threads']} threads "
        "in every process."
    )


def write_result(result: dict, text: str, folder: Path) -> None:
    """Write WORKLOAD.json and WORKLOAD.md; called after every process, so that a broken run leaves what it had."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['workload']}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{result['workload']}.md").write_text(text)


def format_table(titles: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """Return a table in Markdown; rows may be short."""
    padded = [row + [""] * (len(titles) - len(row)) for row in rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in (list(titles), *padded)]
    return [lines[0], "|---" * len(titles) + "|", *lines[1:]]


def why_no_figures(rounds: list[dict], config: str) -> str | None:
    """Return what stands in the table where a configuration failed or hasn't run; None where it has figures."""
    errors = [entry[config]["error"] for entry in rounds if "error" in entry.get(config, {})]
    if errors:
        return f"failed: {errors[0][:200]}"
    return None if values(rounds, config, "tokens_per_s") else "not run yet"


def aim_line(wanted: str, found: list[float], at_least: float = -math.inf, at_most: float = math.inf) -> str:
    """Return one line for a thing to reach, with its figure."""
    if not found:
        return f"- not measured: {wanted}"
    met = at_least <= statistics.median(found) <= at_most
    return f"- {'met' if met else '**not met**'}: {wanted}: {spread(found, '.3g')}"


def values(rounds: list[dict], config: str, field: str) -> list[float]:
    """Return a configuration's figure of each round that has it."""
    return [entry[config][field] for entry in rounds if field in entry.get(config, {})]


def paired(rounds: list[dict], peer: str, field: str) -> list[float]:
    """Return TernLM's value over the peer's, for each round in which both ran."""
    both = [entry for entry in rounds if field in entry.get(OURS, {}) and field in entry.get(peer, {})]
    return [entry[OURS][field] / entry[peer][field] for entry in both] if peer != OURS else []


def spread(found: list[float], form: str) -> str:
    """Return the median, with the lowest and highest where there are several."""
    if not found:
        return ""
    middle = format(statistics.median(found), form)
    return middle if len(found) == 1 else f"{middle} ({min(found):{form}} to {max(found):{form}})"


def name_versions(rounds: list[dict]) -> str:
    """Name every package that took part; two versions of one package are both named."""
    seen: dict[str, set[str]] = {}
    for entry in rounds:
        for result in entry.values():
            for name, version in result.get("versions", {}).items():
                seen.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(seen.items()))
