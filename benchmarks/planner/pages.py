"""The planner's error report as Markdown: each function is a section, made of judged rows. Why is for reasons.py."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fit import DEVIATION, PRIORS, SET
from judge import Judged, Spread, spread

from ternlm.planner.fitted import Constants, Family

CURVES = {"tp1 all": "optimizer states cut over all ranks", "tp1 z8": "optimizer states cut over 8 ranks"}
_UNITS = {"half_inner": "elements", "half_attention": "tokens", "nodes_to_half": "nodes", "launch_us": "us"}
_UNITS |= {"hop_us": "us", "broadcast_hop_us": "us", "reserve_gib": "GiB"}


class Aim(NamedTuple):
    """A bound that the planner is to keep, and what was found; found None: not computed."""

    what: str
    bound: float
    found: float | None
    rows: int

    @property
    def verdict(self) -> str:
        """Whether it is kept."""
        if self.found is None:
            return "not computed"
        return "met" if self.found <= self.bound else "**missed**"


def percent(value: float | None, signed: bool = False) -> str:
    """Return a share as a percentage with one decimal; a dash for None."""
    if value is None:
        return "-"
    return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned right where their heads end in `>`."""
    align = [":-" if not name.endswith(">") else "-:" for name in head]
    lines = [[name.removesuffix(">") for name in head], align, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def aims(judged: Sequence[Judged]) -> list[Aim]:
    """Return the issue's bounds with what was found."""
    fitted, outside = spread(j.error for j in judged), spread(j.left_out_error("source") for j in judged)
    curves = spread(j.error for j in judged if is_of_curve(j))
    memory = spread(j.memory_error for j in judged)

    def one(what: str, bound: float, of: Spread | None, which: str) -> Aim:
        return Aim(what, bound, getattr(of, which) if of else None, of.count if of else 0)

    return [
        one("tokens/s, median", 0.05, fitted, "median"),
        one("tokens/s, 90th percentile", 0.15, fitted, "ninth_decile"),
        one("tokens/s, left out by source, median", 0.08, outside, "median"),
        one("the ancestor's two curves, worst point", 0.06, curves, "worst"),
        one("peak memory, worst row", 0.05, memory, "worst"),
    ]


def is_of_curve(judged: Judged) -> bool:
    """Whether a row is a point of the ancestor's two curves."""
    return judged.row.source.startswith("InternLM train_performance") and judged.row.note in CURVES


def summary(judged: Sequence[Judged]) -> str:
    """Return the tables of aims and of all spreads."""
    kept = [[a.what, str(a.rows), f"{percent(a.bound)} %", f"{percent(a.found)} %", a.verdict] for a in aims(judged)]
    groups = [
        ("tokens/s, shipped constants", [j.error for j in judged]),
        ("tokens/s, left out by source", [j.left_out_error("source") for j in judged]),
        ("tokens/s, left out by model", [j.left_out_error("model") for j in judged]),
        ("the ancestor's two curves", [j.error for j in judged if is_of_curve(j)]),
        ("peak memory", [j.memory_error for j in judged]),
    ]
    lines = [_spread_line(name, spread(errors)) for name, errors in groups]
    within = [j.memory_error for j in judged if j.memory_error is not None]
    about = ""
    if within:
        inside = sum(abs(error) <= 0.05 for error in within)
        about = f"\n\nOf {len(within)} rows with published memory, {inside} are within 5 %."
    return (
        f"{table(['aim', 'rows>', 'bound>', 'found>', ''], kept)}\n\n"
        f"Absolute errors in %; bias is the median of signed ones, + where the planner is too high.\n\n"
        f"{table(['figure', 'rows>', 'median>', '90th percentile>', 'worst>', 'bias>'], lines)}{about}"
    )


def _spread_line(name: str, of: Spread | None) -> list[str]:
    if of is None:
        return [name, "0", "-", "-", "-", "-"]
    return [name, str(of.count), *map(percent, of[1:4]), percent(of.bias, signed=True)]


def constants_section(c: Constants) -> str:
    """Return the constants: value, prior, meaning."""
    lines = []
    for name, (prior, width) in PRIORS.items():
        family, _, short = name.rpartition(".")
        value = getattr(getattr(c, family), short) if family else getattr(c, short)
        info = (Family if family else Constants).model_fields[short]
        meaning = str(info.description) + (f" ({c.__class__.model_fields[family].description})" if family else "")
        unit = f" {_UNITS[name]}" if name in _UNITS else ""
        lines.append([f"`{name}`", f"{value:.4g}{unit}", f"{prior:g}", f"{100 * width:.0f} %", meaning])
    for name in SET:
        value = f"{getattr(c, name):g} {_UNITS.get(name, '')}".strip()
        lines.append([f"`{name}`", value, "set", "", str(Constants.model_fields[name].description)])
    return table(["constant", "value>", "prior>", "its width>", "meaning"], lines)


def by_group(judged: Sequence[Judged], name: str, key: Callable[[Judged], str], outside: str) -> str:
    """Return errors by a key of rows; outside: which left-out fit stands beside them."""
    lines = []
    for group in sorted({key(j) for j in judged if j.error is not None}):
        own = [j for j in judged if key(j) == group]
        fitted, left = spread(j.error for j in own), spread(j.left_out_error(outside) for j in own)
        assert fitted is not None
        further = [*map(percent, left[1:4]), percent(left.bias, signed=True)] if left else ["-"] * 4
        lines.append([*_spread_line(group, fitted), *further])
    return table(
        [name, "rows>", "median>", "90th>", "worst>", "bias>", "left out: median>", "90th>", "worst>", "bias>"], lines
    )


def curves_section(judged: Sequence[Judged]) -> str:
    """Return the ancestor's two curves point by point, and how far each falls."""
    parts = []
    for note, meaning in CURVES.items():
        points = sorted((j for j in judged if is_of_curve(j) and j.row.note == note), key=lambda j: j.row.layout.world)
        if not points:
            continue
        lines = []
        for j in points:
            traffic = sum(share for part, share in j.shares.items() if " over " in part)
            left = percent(j.left_out_error("source"), signed=True)
            figures = [f"{j.row.tokens_per_second:.0f}", f"{j.tokens_per_second:.0f}", percent(j.error, signed=True)]
            lines.append([str(j.row.layout.world), *figures, left, percent(traffic)])
        first, last = points[0], points[-1]
        assert first.row.tokens_per_second is not None
        assert last.row.tokens_per_second is not None
        falls = (
            f"From {first.row.layout.world} to {last.row.layout.world} devices it falls to "
            f"{last.row.tokens_per_second / first.row.tokens_per_second:.1%} as published and to "
            f"{last.tokens_per_second / first.tokens_per_second:.1%} as predicted."
        )
        head = ["devices>", "published>", "predicted>", "error, %>", "left out, %>", "exposed communication, %>"]
        parts.append(f"**InternLM-7B, {meaning}.** {falls}\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def memory_section(judged: Sequence[Judged]) -> str:
    """Return published and predicted peak memory, with what it consists of."""
    lines = []
    for j in sorted((j for j in judged if j.memory_error is not None), key=lambda j: -abs(j.memory_error or 0)):
        parts = sorted(j.memory_parts_gib.items(), key=lambda item: -item[1])
        biggest = ", ".join(f"{part} {size:.1f}" for part, size in parts[:4])
        figures = [f"{j.row.memory_gib:g}", f"{j.memory_gib:.1f}", percent(j.memory_error, signed=True)]
        lines.append([short_source(j), f"{j.row.model} {run_of(j)}", *figures, biggest])
    return table(["source", "run", "published>", "predicted>", "error, %>", "largest parts, GiB"], lines)


def all_rows(judged: Sequence[Judged]) -> str:
    """Return every row with a published speed."""
    lines = []
    for j in judged:
        if j.row.tokens_per_second is None:
            continue
        figures = [f"{j.row.tokens_per_second:.0f}", f"{j.tokens_per_second:.0f}"]
        errors = (j.error, j.left_out_error("source"), j.left_out_error("model"))
        lines.append(
            [
                j.row.id,
                short_source(j),
                f"{j.row.model} {run_of(j)}",
                *figures,
                *(percent(e, signed=True) for e in errors),
            ]
        )
    head = ["row", "source", "run", "published>", "predicted>", "error, %>", "source left out>", "model left out>"]
    return table(head, lines)


def short_source(judged: Judged) -> str:
    """Return the first words of a source's name."""
    return " ".join(judged.row.source.split("(")[0].split()[:2])


def run_of(judged: Judged) -> str:
    """Return what sets a run apart: devices, layout, batch."""
    row = judged.row
    layout, batch, compute = row.layout, row.config.batch, row.config.compute
    words = [f"{layout.world} x {row.sheet.name.split()[1].removesuffix('-80GB')} {row.sheet.memory_gib:g}"]
    degrees = {"tp": layout.tensor, "pp": layout.pipeline, "cp": layout.context, "shard": layout.shard}
    words += [f"{name}{degree}" for name, degree in degrees.items() if degree > 1]
    words.append(f"{batch.microbatch_sequences} x {row.config.data.seq_len}")
    words += (
        ["recompute"] * bool(compute.recompute) + ["fp8"] * row.program.float8 + ["async TP"] * ("async TP" in row.note)
    )
    return ", ".join(words)


def fitting() -> str:
    """Return how constants come about."""
    return f"""Each row's settings make a list of kernels and messages, as for TernLM's own. Where another framework
does otherwise (bytes of states, kernels, what overlaps), `benchmarks/planner/rows.py` says how: by rules for a source,
never for a row. The constants then minimize the squared logarithms of predicted over published tokens/s, in units of
{percent(DEVIATION)} %, with less weight for outliers (soft L1) and for sources of many rows (count^-1/4).
Each constant has a prior, from kernels' and NCCL's benchmarks, and may move by its width for the price of one such
unit; one that the rows say nothing of stays at its prior. No constant is of a row. Some speak of what a single source
has: `biased` of llm-foundry's MPT models, `flash1` and `broadcast_hop_us` of the ancestor's framework.

Left out by source (by model): all rows of one source (model) are predicted by constants that were fitted to the other
sources (models). That is what to expect of runs that the fit hasn't seen."""
