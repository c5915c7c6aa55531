"""One run on ever more devices: how fast, how efficient, how dear; as a table and a plot. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.planner.choice import choice_of
from ternlm.planner.cluster import Cluster
from ternlm.planner.memory import GIB
from ternlm.planner.plan import DAY, HOUR, Plan, make_plan
from ternlm.planner.search import Search


@dataclass(frozen=True)
class Point:
    """A number of devices."""

    world: int
    plan: Plan | None
    """None where no layout is legal."""
    note: str
    """What was chosen, or why there is no plan."""


def scale(
    config: Config,
    cluster: Cluster,
    worlds: Sequence[int],
    document_tokens: int | None = None,
    sequences_per_device: float = 0.0,
    search: bool = False,
) -> list[Point]:
    """Predict a run on each number of devices.

    sequences_per_device: by which the global batch grows with the devices; 0: it stays. search: take the best layout of
    each instead of the settings'.
    """
    points = []
    for world in worlds:
        try:
            grown = _with_batch(config, round(sequences_per_device * world)) if sequences_per_device else config
            if search:
                choice, plan = Search(grown, cluster, world, document_tokens).run(1).best[0]
                note = " ".join(choice.overrides(choice_of(config)))
            else:
                plan, note = make_plan(grown, cluster, world, document_tokens), ""
            points.append(Point(world, plan, note))
        except ConfigError as error:
            points.append(Point(world, None, str(error)))
    return points


def doublings(first: int, last: int) -> list[int]:
    """Return first, twice that, and so on up to last."""
    worlds = [first]
    while worlds[-1] * 2 <= last:
        worlds.append(worlds[-1] * 2)
    return worlds


def scale_table(points: Sequence[Point], tokens: float) -> Table:
    """Return the table of what has a plan; tokens: how long the run is."""
    plans = [point.plan for point in points if point.plan]
    priced = bool(plans and plans[0].cluster.dollars_per_hour)
    names = ["tokens/s", "rel.", "", "MFU", "sent", "idle", "GiB", "days", "dollars" if priced else "hours"]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ["devices", *names]:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for plan in plans:
        table.add_row(f"{plan.layout.world:,}", *_cells(plan, plans[0], tokens))
    return table


def scale_notes(points: Sequence[Point]) -> list[str]:
    """Return what the table's columns mean, which layout each has if it isn't the settings', and what has no plan."""
    lines = [
        "tokens/s of one device; rel.: of the first; sent, idle: exchange's and the pipeline's share; !: doesn't fit"
    ]
    return lines + [f"{point.world:,}: {point.note}" for point in points if point.note]


def scale_figures(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the same as plain numbers."""
    return [
        {
            "devices": point.world,
            "tokens_per_second_per_device": point.plan.tokens_per_second if point.plan else None,
            "step_seconds": point.plan.time.seconds if point.plan else None,
            "mfu": point.plan.mfu.full if point.plan else None,
            "memory_bytes": point.plan.memory.bytes if point.plan else None,
            "fits": point.plan.fits if point.plan else False,
            "note": point.note,
        }
        for point in points
    ]


def plot_scale(points: Sequence[Point], file: Path) -> None:
    """Draw tokens/s of one device over the number of devices, into a PNG, SVG or PDF file (extra `plot`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"--plot = {file} needs the package matplotlib; install the extra with pip install 'ternlm[plot]', or "
            "leave --plot out: the table has bars"
        ) from error
    plans = [point.plan for point in points if point.plan]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    worlds = [plan.layout.world for plan in plans]
    axes.plot(worlds, [plan.tokens_per_second for plan in plans], marker="o", color="#1f5fa8")
    for plan in plans:
        if not plan.fits:
            axes.plot(plan.layout.world, plan.tokens_per_second, marker="x", markersize=12, color="#c0392b")
    axes.set_xscale("log", base=2)
    axes.set_xticks(worlds, [f"{world:,}" for world in worlds])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_xlabel("devices (a red cross: doesn't fit)")
    axes.set_ylabel("predicted tokens/s of a device")
    axes.set_title(plans[0].cluster.name if plans else "no layout is legal")
    figure.savefig(file, dpi=150)


def _cells(plan: Plan, first: Plan, tokens: float) -> list[str]:
    share, seconds = plan.tokens_per_second / first.tokens_per_second, plan.seconds_for(tokens)
    exchanged = plan.bounds.get("communication", 0.0) / plan.time.seconds
    cells = [
        f"{plan.tokens_per_second:,.0f}",
        f"{share:.0%}",
        "█" * max(round(share * 8), 1),
        f"{plan.mfu.full:.1%}",
        f"{exchanged:.0%}",
        f"{plan.time.parts.get('bubble', 0.0) / plan.time.seconds:.0%}",
        f"{plan.memory.bytes / GIB:.1f}" + "!" * (not plan.fits),
        f"{seconds / DAY:,.2f}",
    ]
    price = plan.dollars_for(tokens) if first.cluster.dollars_per_hour else seconds / HOUR * plan.layout.world
    return [*cells, f"{price:,.0f}"]


def _with_batch(config: Config, sequences: int) -> Config:
    return config.model_copy(update={"batch": config.batch.model_copy(update={"global_sequences": sequences})})
