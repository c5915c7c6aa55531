"""What `tern plan --search` prints: the best layouts, why each loses to the best, what was refused. No torch here."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from ternlm.config.run import Config
from ternlm.planner.choice import choice_of
from ternlm.planner.length import run_length
from ternlm.planner.memory import GIB
from ternlm.planner.plan import Plan
from ternlm.planner.search import Found
from ternlm.planner.show import NEAR_LIMIT, layout_words


def search_tables(found: Found, config: Config) -> Group:
    """Return the tables."""
    before, (best, fastest) = choice_of(config), found.best[0]
    table = Table("", box=box.SIMPLE, title="the fastest layouts that fit", title_justify="left", title_style="bold")
    for name in ("tokens/s", "MFU", "GiB"):
        table.add_column(name, justify="right")
    table.add_column("settings", overflow="fold", ratio=3)
    table.add_column("why it isn't the first", overflow="fold", ratio=2)
    for number, (choice, plan) in enumerate(found.best, 1):
        figures = f"{plan.tokens_per_second:,.0f}", f"{plan.mfu.full:.1%}", f"{plan.memory.bytes / GIB:.1f}"
        settings = " ".join(choice.overrides(before, plan.layout.world)) or "as in the recipe"
        table.add_row(str(number), *figures, settings, loses_by(plan, fastest) if number > 1 else "")
    typed = " ".join(best.overrides(before, fastest.layout.world)) or "nothing: the recipe has it"
    said = [f"The first: {layout_words(fastest.layout)}", f"To take it, add: {typed}"]
    said += [f"Its memory is {NEAR_LIMIT}"] * fastest.fits_barely
    return Group(table, *said, "", *_refused(found))


def search_figures(found: Found, config: Config, tokens: float, first: int = 0) -> dict[str, Any]:
    """Return the same as plain numbers, with the length of the run: `tokens` from the step number `first` on."""
    before, fastest = choice_of(config), found.best[0][1]
    return {
        "cluster": fastest.cluster.name,
        "devices_per_node": fastest.cluster.devices_per_node,
        "devices": fastest.layout.world,
        "nodes": fastest.nodes,
        "best": [
            {
                "overrides": choice.overrides(before, plan.layout.world),
                "choice": asdict(choice),
                "tokens_per_second_per_device": plan.tokens_per_second,
                "step_seconds": plan.time.seconds,
                "memory_bytes": plan.memory.bytes,
                "run": asdict(run_length(plan, tokens, first)),
            }
            for choice, plan in found.best
        ],
        "illegal": dict(found.illegal),
        "too_large": found.too_large,
        "slower": found.slower,
    }


def loses_by(plan: Plan, best: Plan, count: int = 3) -> str:
    """Say which parts of a step take longer than in the best plan: `+5.2% (matmul +31 ms, bubble +12 ms; ...)`."""
    whole = plan.time.seconds / best.time.seconds - 1
    if whole < 5e-4:
        return "as fast, but further from the default settings"
    names = dict.fromkeys([*plan.time.parts, *best.time.parts])
    more = {name: plan.time.parts.get(name, 0.0) - best.time.parts.get(name, 0.0) for name in names}
    longest = sorted(more.items(), key=lambda item: -item[1])[:count]
    said = ", ".join(
        f"{name} +{seconds * 1e3:.3g} ms" for name, seconds in longest if seconds > 0.05 * max(more.values())
    )
    return f"{whole:.1%} slower: {said}"


def _refused(found: Found) -> list[str]:
    lines = ["Left out:"] if found.slower or found.too_large or found.illegal else []
    if found.slower:
        lines.append(f"  {found.slower:,} meshes that would be slower than all of these, had they all memory they want")
    if found.too_large and found.least:
        lines.append(
            f"  {found.too_large:,} meshes that don't fit, however cut and recomputed; the least "
            f"of them needs {found.least[0] / GIB:.1f} GiB"
        )
    lines += [f"  {count:,} meshes: {message}" for message, count in found.illegal.most_common()]
    return lines
