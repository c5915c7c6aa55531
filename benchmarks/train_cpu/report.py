"""From the rounds' results to results.json and results.md: medians, paired ratios, aims met or not."""

import json
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


def write_report(results: dict, folder: Path) -> None:
    """Write results.json and results.md; called after every process, so that a broken run leaves what it had."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(format_report(results))


def format_report(results: dict) -> str:
    """Return the whole report in Markdown."""
    hardware, settings = results["hardware"], results["settings"]
    lines = [
        "# One training step on CPU",
        "",
        f"{results['date']}; {hardware['processor']}, {hardware['cores']} cores, "
        f"{hardware['memory_gib']} GiB, {' '.join(hardware['vector_instructions'])}; "
        f"{hardware['threads']} threads in every process.",
        "",
        f"float32, fused AdamW, clipping at 1.0. Each configuration is a process of its own: {settings['warmup']} "
        f"steps of warm-up (compilation), then {settings['steps']} timed; {settings['rounds']} rounds in alternating "
        "order. A step lasts from the end of the one before to its own end. Ratios are paired by round; "
        "median (lowest to highest). Peak memory is the process's resident set up to its last timed step.",
    ]
    for workload in results["workloads"]:
        lines += ["", *_format_workload(workload)]
    lines += ["", "Versions: " + _versions(results), ""]
    return "\n".join(lines)


def _format_workload(workload: dict) -> list[str]:
    rounds = workload["rounds"]
    peaks = _values(rounds, SGEMM, "flops_per_s")
    lines = [
        f"## {workload['name']}: {workload['title']}",
        "",
        f"{workload['batch']} x {workload['seq_len']} tokens a step; documents of "
        f"{workload['mean_document_tokens']:.0f} tokens on average; {workload['flops_per_token'] / 1e6:.1f} MFLOP a "
        f"token (6 N without the input embedding + causal attention inside documents); sgemm peak "
        f"{_spread([x / 1e9 for x in peaks], '.0f')} GFLOP/s.",
        "",
        "| configuration | tokens/s | TernLM is times as fast | % of sgemm peak | peak memory, GiB | "
        "TernLM's memory / its | first step ends after, s | loss, first to last step | documents |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_format_row(workload, config) for config in workload["configs"]]
    return [*lines, "", *_format_aims(workload)]


def _format_row(workload: dict, config: str) -> str:
    label, rounds = CONFIGURATIONS[config].label, workload["rounds"]
    errors = [entry[config]["error"] for entry in rounds if "error" in entry.get(config, {})]
    if errors:
        return f"| {label} | failed: {' '.join(errors[0])[:200]} | | | | | | | |"
    speeds = _values(rounds, config, "tokens_per_s")
    if not speeds:
        return f"| {label} | not run yet | | | | | | | |"
    first = next(entry[config] for entry in rounds if config in entry)
    memory = [x / GIB for x in _values(rounds, config, "peak_rss_bytes")]
    cells = [
        label,
        _spread(speeds, ".1f"),
        _spread(_paired(rounds, config, "tokens_per_s"), ".2f"),
        _spread(_percent_of_peak(workload, config), ".0f"),
        f"{statistics.median(memory):.2f}",
        _spread(_paired(rounds, config, "peak_rss_bytes"), ".2f"),
        f"{first['first_step_end_seconds']:.0f}",
        f"{first['losses'][0]:.3f} to {first['losses'][-1]:.3f}",
        first["boundaries"],
    ]
    return "| " + " | ".join(cells) + " |"


def _format_aims(workload: dict) -> list[str]:
    """One line for each thing to reach, with its figure; empty where TernLM or the peer did not run."""
    rounds, aim = workload["rounds"], workload["aim"]
    lines = []
    for peer in aim["against"]:
        label = CONFIGURATIONS[peer].label
        speed = _paired(rounds, peer, "tokens_per_s")
        if speed:
            wanted = f"at least {aim['ratio']:g} times {label}"
            lines.append(_aim_line(wanted, statistics.median(speed) >= aim["ratio"], _spread(speed, ".2f")))
        memory = _paired(rounds, peer, "peak_rss_bytes") if aim["memory"] else []
        if memory:
            wanted = f"at most {aim['memory']:g} times the peak memory of {label}"
            lines.append(_aim_line(wanted, statistics.median(memory) <= aim["memory"], _spread(memory, ".2f")))
    percent = _percent_of_peak(workload, OURS) if aim["percent_of_peak"] else []
    if percent:
        wanted = f"at least {aim['percent_of_peak']:g}% of the sgemm peak"
        met = statistics.median(percent) >= aim["percent_of_peak"]
        lines.append(_aim_line(wanted, met, _spread(percent, ".1f")))
    return lines


def _aim_line(wanted: str, met: bool, figure: str) -> str:
    return f"- {'met' if met else '**not met**'}: {wanted}: {figure}"


def _values(rounds: list[dict], config: str, field: str) -> list[float]:
    return [entry[config][field] for entry in rounds if field in entry.get(config, {})]


def _paired(rounds: list[dict], peer: str, field: str) -> list[float]:
    """TernLM's value over the peer's, for each round in which both ran."""
    both = [entry for entry in rounds if field in entry.get(OURS, {}) and field in entry.get(peer, {})]
    return [entry[OURS][field] / entry[peer][field] for entry in both] if peer != OURS else []


def _percent_of_peak(workload: dict, config: str) -> list[float]:
    both = [
        entry
        for entry in workload["rounds"]
        if "flops_per_s" in entry.get(SGEMM, {}) and "tokens_per_s" in entry.get(config, {})
    ]
    flops = workload["flops_per_token"]
    return [100 * entry[config]["tokens_per_s"] * flops / entry[SGEMM]["flops_per_s"] for entry in both]


def _spread(values: list[float], form: str) -> str:
    """Median, with the lowest and highest where there are several."""
    if not values:
        return ""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def _versions(results: dict) -> str:
    """Name every package that took part; two versions of one package are both named."""
    seen: dict[str, set[str]] = {}
    for workload in results["workloads"]:
        for entry in workload["rounds"]:
            for result in entry.values():
                for name, version in result.get("versions", {}).items():
                    seen.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(seen.items()))
