"""From the rounds' results to Markdown: medians, paired ratios, losses, whether all had the same samples, aims."""

import statistics
import sys
from pathlib import Path

from workloads import CONFIGURATIONS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interleaved.figures import (
    GIB,
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
    lines = [
        f"# Fine-tuning on CPU: {result['title']}",
        "",
        state_of(result),
        "",
        f"{result['model']} in float32 on {result['samples']} questions and answers of {result['source']}, loss on "
        f"answers alone, AdamW at a constant {result['lr']:g}, clipping at {result['clip_norm']:g}. A step is a row of "
        f"{result['seq_len']} tokens where samples are packed, else {result['samples_per_step']} samples.",
        "",
        f"Each configuration is a process of its own: {settings['warmup']} steps of warm-up (compilation), then "
        f"{settings['steps']} timed; {settings['rounds']} rounds in alternating order. A step lasts from the end of "
        "the one before to its own end; tokens are those of questions and answers, not padding. Ratios are paired by "
        "round; median (lowest to highest). Peak memory is the process's resident set up to its last timed step; the "
        "first step's end is counted from the process's start, with nothing compiled or tokenized before.",
        "",
        *_table(result),
        "",
        *_format_aims(result),
        "",
        *_compare_samples(result),
        "",
        *_losses(result),
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
        "tokens a step",
        "peak memory, GiB",
        "TernLM's memory / its",
        "first step ends after, s",
        "weights trained",
        "samples in a row",
    )
    return format_table(titles, [_make_row(result, config) for config in result["configs"]])


def _make_row(result: dict, config: str) -> list[str]:
    label, rounds = CONFIGURATIONS[config].label, result["rounds"]
    if reason := why_no_figures(rounds, config):
        return [label, reason]
    first = _first(rounds, config)
    memory = [x / GIB for x in values(rounds, config, "peak_rss_bytes")]
    steps = [n for entry in rounds for n in entry.get(config, {}).get("step_tokens", [])]
    return [
        label,
        spread(values(rounds, config, "tokens_per_s"), ".1f"),
        spread(paired(rounds, config, "tokens_per_s"), ".2f"),
        f"{statistics.mean(steps):.0f}",
        f"{statistics.median(memory):.2f}",
        spread(paired(rounds, config, "peak_rss_bytes"), ".2f"),
        spread(values(rounds, config, "first_step_end_seconds"), ".0f"),
        f"{first['num_trained']:,}",
        first["boundaries"],
    ]


def _format_aims(result: dict) -> list[str]:
    """Two lines, of speed and of memory, for each peer that an aim is against."""
    if result["aims"] is None:
        return ["The workload was changed: its aims don't apply."]
    lines = []
    for aim in result["aims"]:
        against = [name for name in result["configs"] if name.partition("-")[0] == aim["peer"]]
        for config in against or [aim["peer"]]:
            label = CONFIGURATIONS[config].label if config in CONFIGURATIONS else config
            speed = paired(result["rounds"], config, "tokens_per_s")
            lines.append(aim_line(f"at least {aim['ratio']:g} times {label}", speed, at_least=aim["ratio"]))
            memory = paired(result["rounds"], config, "peak_rss_bytes")
            wanted = f"at most {aim['memory']:g} times the peak memory of {label}"
            lines.append(aim_line(wanted, memory, at_most=aim["memory"]))
    return lines


def _compare_samples(result: dict) -> list[str]:
    """Say whether all configurations made the same ids and the same mask of the data."""
    of_digest: dict[str, list[str]] = {}
    counts = {}
    for config in result["configs"]:
        first = _first(result["rounds"], config)
        if first and first.get("data"):
            of_digest.setdefault(first["data"]["digest"], []).append(CONFIGURATIONS[config].label)
            counts[first["data"]["digest"]] = first["data"]
    lines = []
    for digest, labels in of_digest.items():
        data = counts[digest]
        said = f"{data['samples']} samples of {data['tokens']} tokens, {data['learnt_tokens']} of them learnt"
        lines.append(f"- {said} ({digest}): {', '.join(labels)}")
    if len(of_digest) == 1:
        return ["All configurations made the same token ids and loss mask of the data:", "", *lines]
    return ["**Configurations made different samples of the data**:", "", *lines] if lines else []


def _losses(result: dict) -> list[str]:
    """A table of each step's loss, in nats: samples come in each library's own order, so that only trends compare."""
    found = [(config, _first(result["rounds"], config)) for config in result["configs"]]
    rows = [[CONFIGURATIONS[c].label, *(f"{loss:.3f}" for loss in first["losses"])] for c, first in found if first]
    if not rows:
        return []
    steps = tuple(str(number) for number in range(1, len(rows[0])))
    said = "Loss of each step of the first round; every library has its own order of samples."
    if any(config.startswith("litgpt") for config, first in found if first):
        said += " litgpt's is the mean over micro batches of their means, the others' the mean over tokens."
    return [said, "", *format_table(("step", *steps), rows)]


def _first(rounds: list[dict], config: str) -> dict | None:
    """Return the configuration's first result that isn't an error."""
    return next((entry[config] for entry in rounds if "losses" in entry.get(config, {})), None)
