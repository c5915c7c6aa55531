"""From the rounds' results to JSON and Markdown: medians, paired ratios, aims met or not."""

import json
import math
import os
import statistics
import subprocess
from pathlib import Path

from workloads import CONFIGURATIONS, SGEMM

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


def write_report(result: dict, folder: Path) -> None:
    """Write WORKLOAD.json and WORKLOAD.md; called after every process, so that a broken run leaves what it had."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['workload']}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{result['workload']}.md").write_text(format_report(result))


def format_report(result: dict) -> str:
    """Return the report of one workload in Markdown."""
    hardware, settings, rounds = result["hardware"], result["settings"], result["rounds"]
    peaks = [x / 1e9 for x in _values(rounds, SGEMM, "flops_per_s")]
    lines = [
        f"# One training step on CPU: {result['title']}",
        "",
        f"{result['date']}, TernLM at {result['commit']}; {hardware['processor']}, {hardware['cores']} cores, "
        f"{hardware['memory_gib']} GiB, {' '.join(hardware['vector_instructions'])}; {hardware['threads']} threads "
        "in every process.",
        "",
        f"{result['batch']} x {result['seq_len']} tokens a step, documents of {result['mean_document_tokens']:.0f} "
        f"tokens on average; {result['flops_per_token'] / 1e6:.1f} MFLOP a token (6 N without the input embedding + "
        f"causal attention inside documents); sgemm peak {_spread(peaks, '.0f')} GFLOP/s.",
        "",
        f"float32, fused AdamW, clipping at 1.0. Each configuration is a process of its own: {settings['warmup']} "
        f"steps of warm-up (compilation), then {settings['steps']} timed; {settings['rounds']} rounds in alternating "
        "order. A step lasts from the end of the one before to its own end. Ratios are paired by round; median "
        "(lowest to highest). Peak memory is the process's resident set up to its last timed step; the first step's "
        "end is counted from the process's start, with nothing compiled before.",
        "",
        *_table(result),
        "",
        *_format_aims(result),
        "",
        "Versions: " + _versions(rounds),
        "",
    ]
    return "\n".join(lines)


def _table(result: dict) -> list[str]:
    titles = (
        "configuration",
        "tokens/s",
        "TernLM is times as fast",
        "% of sgemm peak",
        "peak memory, GiB",
        "TernLM's memory / its",
        "first step ends after, s",
        "loss, first to last step",
        "documents",
    )
    head = "| " + " | ".join(titles) + " |"
    return [head, "|---" * len(titles) + "|", *(_format_row(result, config) for config in result["configs"])]


def _format_row(result: dict, config: str) -> str:
    label, rounds = CONFIGURATIONS[config].label, result["rounds"]
    errors = [entry[config]["error"] for entry in rounds if "error" in entry.get(config, {})]
    if errors:
        return f"| {label} | failed: {errors[0][:200]} | | | | | | | |"
    speeds = _values(rounds, config, "tokens_per_s")
    if not speeds:
        return f"| {label} | not run yet | | | | | | | |"
    first = next(entry[config] for entry in rounds if config in entry)
    memory = [x / GIB for x in _values(rounds, config, "peak_rss_bytes")]
    cells = [
        label,
        _spread(speeds, ".1f"),
        _spread(_paired(rounds, config, "tokens_per_s"), ".2f"),
        _spread(_percent_of_peak(result, config), ".0f"),
        f"{statistics.median(memory):.2f}",
        _spread(_paired(rounds, config, "peak_rss_bytes"), ".2f"),
        f"{first['first_step_end_seconds']:.0f}",
        f"{first['losses'][0]:.3f} to {first['losses'][-1]:.3f}",
        first["boundaries"],
    ]
    return "| " + " | ".join(cells) + " |"


def _format_aims(result: dict) -> list[str]:
    """One line for each thing to reach, with its figure."""
    rounds, aim = result["rounds"], result["aim"]
    if aim is None:
        return ["The workload was resized: its aims don't apply."]
    lines = []
    for peer in aim["against"]:
        label = CONFIGURATIONS[peer].label
        speed = _paired(rounds, peer, "tokens_per_s")
        lines.append(_aim_line(f"at least {aim['ratio']:g} times {label}", speed, at_least=aim["ratio"]))
        if aim["memory"]:
            memory = _paired(rounds, peer, "peak_rss_bytes")
            wanted = f"at most {aim['memory']:g} times the peak memory of {label}"
            lines.append(_aim_line(wanted, memory, at_most=aim["memory"]))
    if aim["percent_of_peak"]:
        wanted = f"at least {aim['percent_of_peak']:g}% of the sgemm peak"
        percent = _percent_of_peak(result, OURS)
        lines.append(_aim_line(wanted, percent, at_least=aim["percent_of_peak"]))
    return lines


def _aim_line(wanted: str, values: list[float], at_least: float = -math.inf, at_most: float = math.inf) -> str:
    if not values:
        return f"- not measured: {wanted}"
    met = at_least <= statistics.median(values) <= at_most
    return f"- {'met' if met else '**not met**'}: {wanted}: {_spread(values, '.3g')}"


def _values(rounds: list[dict], config: str, field: str) -> list[float]:
    return [entry[config][field] for entry in rounds if field in entry.get(config, {})]


def _paired(rounds: list[dict], peer: str, field: str) -> list[float]:
    """TernLM's value over the peer's, for each round in which both ran."""
    both = [entry for entry in rounds if field in entry.get(OURS, {}) and field in entry.get(peer, {})]
    return [entry[OURS][field] / entry[peer][field] for entry in both] if peer != OURS else []


def _percent_of_peak(result: dict, config: str) -> list[float]:
    both = [
        entry
        for entry in result["rounds"]
        if "flops_per_s" in entry.get(SGEMM, {}) and "tokens_per_s" in entry.get(config, {})
    ]
    flops = result["flops_per_token"]
    return [100 * entry[config]["tokens_per_s"] * flops / entry[SGEMM]["flops_per_s"] for entry in both]


def _spread(values: list[float], form: str) -> str:
    """Median, with the lowest and highest where there are several."""
    if not values:
        return ""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def _versions(rounds: list[dict]) -> str:
    """Name every package that took part; two versions of one package are both named."""
    seen: dict[str, set[str]] = {}
    for entry in rounds:
        for result in entry.values():
            for name, version in result.get("versions", {}).items():
                seen.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(seen.items()))
