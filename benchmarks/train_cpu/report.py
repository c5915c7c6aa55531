"""From the rounds' results to Markdown: medians, paired ratios, aims met or not."""

import statistics
import sys
from pathlib import Path

from workloads import CONFIGURATIONS, SGEMM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interleaved.figures import (
    GIB,
    OURS,
    aim_line,
    format_table,
    name_versions,
    paired,
    spread,
    state_of,
    values,
    why_no_figures,
)


def format_report(result: dict) -> str:
    """Return the report of one workload in Markdown."""
    settings, rounds = result["settings"], result["rounds"]
    peaks = [x / 1e9 for x in values(rounds, SGEMM, "flops_per_s")]
    lines = [
        f"# One training step on CPU: {result['title']}",
        "",
        state_of(result),
        "",
        f"{result['batch']} x {result['seq_len']} tokens a step, documents of {result['mean_document_tokens']:.0f} "
        f"tokens on average; {result['flops_per_token'] / 1e6:.1f} MFLOP a token (6 N without the input embedding + "
        f"causal attention inside documents); sgemm peak {spread(peaks, '.0f')} GFLOP/s.",
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
        "Versions: " + name_versions(rounds),
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
    return format_table(titles, [_make_row(result, config) for config in result["configs"]])


def _make_row(result: dict, config: str) -> list[str]:
    label, rounds = CONFIGURATIONS[config].label, result["rounds"]
    if reason := why_no_figures(rounds, config):
        return [label, reason]
    first = next(entry[config] for entry in rounds if config in entry)
    memory = [x / GIB for x in values(rounds, config, "peak_rss_bytes")]
    return [
        label,
        spread(values(rounds, config, "tokens_per_s"), ".1f"),
        spread(paired(rounds, config, "tokens_per_s"), ".2f"),
        spread(_percent_of_peak(result, config), ".0f"),
        f"{statistics.median(memory):.2f}",
        spread(paired(rounds, config, "peak_rss_bytes"), ".2f"),
        f"{first['first_step_end_seconds']:.0f}",
        f"{first['losses'][0]:.3f} to {first['losses'][-1]:.3f}",
        first["boundaries"],
    ]


def _format_aims(result: dict) -> list[str]:
    """One line for each thing to reach, with its figure."""
    rounds, aim = result["rounds"], result["aim"]
    if aim is None:
        return ["The workload was resized: its aims don't apply."]
    lines = []
    for peer in aim["against"]:
        label = CONFIGURATIONS[peer].label
        speed = paired(rounds, peer, "tokens_per_s")
        lines.append(aim_line(f"at least {aim['ratio']:g} times {label}", speed, at_least=aim["ratio"]))
        if aim["memory"]:
            memory = paired(rounds, peer, "peak_rss_bytes")
            wanted = f"at most {aim['memory']:g} times the peak memory of {label}"
            lines.append(aim_line(wanted, memory, at_most=aim["memory"]))
    if aim["percent_of_peak"]:
        wanted = f"at least {aim['percent_of_peak']:g}% of the sgemm peak"
        percent = _percent_of_peak(result, OURS)
        lines.append(aim_line(wanted, percent, at_least=aim["percent_of_peak"]))
    return lines


def _percent_of_peak(result: dict, config: str) -> list[float]:
    both = [
        entry
        for entry in result["rounds"]
        if "flops_per_s" in entry.get(SGEMM, {}) and "tokens_per_s" in entry.get(config, {})
    ]
    flops = result["flops_per_token"]
    return [100 * entry[config]["tokens_per_s"] * flops / entry[SGEMM]["flops_per_s"] for entry in both]
