"""From the rounds' results to Markdown: a table for each load, memory, and the aims by paired ratios."""

import sys
from pathlib import Path

from servers import SERVERS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interleaved.figures import GIB, OURS, aim_line, format_table, name_versions, spread, state_of, values


def format_report(result: dict) -> str:
    """Return the report in Markdown."""
    settings = result["settings"]
    words, tokens = result["prompt_words"], result["output_tokens"]
    lines = [
        "# Serving on a CPU",
        "",
        state_of(result),
        "",
        f"{result['model']}; prompts of {words[0]} to {words[1]} words, greedy answers of {tokens[0]} to {tokens[1]} "
        "tokens, streamed by /v1/completions. Each client sends its next request when it has the last answer. Every "
        f"server has memory for {settings['tokens']:,} tokens or more and continues up to {settings['texts']} texts at "
        f"once. Each is a process of its own in each of {settings['rounds']} rounds of alternating order, warmed up by "
        "8 requests; all get the same requests. What sends them shares the processor. Median (lowest to highest); "
        "times are medians of a load's requests.",
        "",
    ]
    for load in result["loads"]:
        lines += [f"## {result['loads'][load]['title']}", "", *_table(result, load), ""]
    lines += ["## Start and memory", "", *_memory(result), "", "## Aims", "", *_aims(result), ""]
    return "\n".join([*lines, "Versions: " + name_versions(result["rounds"]), ""])


def _table(result: dict, load: str) -> list[str]:
    titles = ("server", "tokens/s", "tern serve is times as fast", "first token, s", "each further token, ms")
    rounds, rows = result["rounds"], []
    for config in result["configs"]:
        label = SERVERS[config].label
        if reason := _why_none(rounds, config, f"{load}.tokens_per_s"):
            rows.append([label, reason])
            continue
        steps = [1000 * x for x in values(rounds, config, f"{load}.token_s")]
        rows.append([
            label,
            spread(values(rounds, config, f"{load}.tokens_per_s"), ".1f"),
            spread([] if config == OURS else ratios(rounds, OURS, config, load), ".2f"),
            spread(values(rounds, config, f"{load}.first_token_s"), ".3f"),
            spread(steps, ".1f"),
        ])  # fmt: skip
    return format_table(titles, rows)


def _memory(result: dict) -> list[str]:
    rounds, rows = result["rounds"], []
    for config in result["configs"]:
        peaks = [x / GIB for x in values(rounds, config, "peak_rss_bytes")]
        starts = values(rounds, config, "start_seconds")
        rows.append([SERVERS[config].label, spread(starts, ".1f"), spread(peaks, ".2f")])
    return format_table(("server", "answers after, s", "peak memory of all its processes, GiB"), rows)


def _aims(result: dict) -> list[str]:
    lines = []
    for aim in result["aims"]:
        for load in (name for name in aim["loads"] if name in result["loads"]):
            ours, peer = SERVERS[aim["ours"]].label, SERVERS[aim["peer"]].label
            wanted = f"{ours} at least {aim['ratio']:g} times {peer}, {result['loads'][load]['title']}"
            found = ratios(result["rounds"], aim["ours"], aim["peer"], load)
            lines.append(aim_line(wanted, found, at_least=aim["ratio"]))
    return lines


def ratios(rounds: list[dict], ours: str, peer: str, load: str) -> list[float]:
    """Return the speed of one server over another's, for each round in which both ran."""
    field = f"{load}.tokens_per_s"
    both = [entry for entry in rounds if all(field in entry.get(name, {}) for name in (ours, peer))]
    return [entry[ours][field] / entry[peer][field] for entry in both]


def _why_none(rounds: list[dict], config: str, field: str) -> str | None:
    errors = [entry[config]["error"] for entry in rounds if "error" in entry.get(config, {})]
    if errors:
        return f"failed: {errors[0][:200]}"
    return None if values(rounds, config, field) else "not run yet"
