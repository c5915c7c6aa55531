"""One run on ever more devices: how fast, how efficient, how dear; as a table and a plot. No torch here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.planner.choice import choice_of
from ternlm.planner.cluster import Cluster
from ternlm.planner.length import run_length
from ternlm.planner.memory import GIB
from ternlm.planner.plan import DAY, Plan, make_plan
from ternlm.planner.search import Search


@dataclass(frozen=True)
class Point:
    """A number of devices."""

    world: int
    plan: Plan | None
    """None where no layout is legal."""
    note: str
    """What to type for it, or why there is no plan."""


def scale(
    config: Config,
    cluster: Cluster,
    worlds: Sequence[int],
    document_tokens: int | None = None,
    sequences_per_device: float = 0.0,
    search: bool = False,
) -> list[Point]:
    """Predict a run on each number of devices.

    sequences_per_device: by which the global batch, and the smaller ones that it grows from, grow with the devices; 0:
    they stay. search: take the best layout of each instead of the settings'. Raises ConfigError where none has a plan.
    """
    points = []
    for world in worlds:
        try:
            sizes = _batch_sizes(config, sequences_per_device * world) if sequences_per_device else {}
            grown = _with_batch(config, sizes)
            typed = [f"batch.{name}={size}" for name, size in sizes.items()]
            if search:
                choice, plan = Search(grown, cluster, world, document_tokens).run(1).best[0]
                typed += choice.overrides(choice_of(config), world)
            else:
                plan = make_plan(grown, cluster, world, document_tokens)
            points.append(Point(world, plan, " ".join(typed)))
        except ConfigError as error:
            points.append(Point(world, None, str(error)))
    if not any(point.plan for point in points):
        last = points[-1]
        raise ConfigError(
            f"no number of devices from {worlds[0]:,} to {last.world:,} has a plan; of the last: {last.note}"
        )
    return points


def doublings(first: int, last: int) -> list[int]:
    """Return first, twice that, and so on up to last."""
    worlds = [first]
    while worlds[-1] * 2 <= last:
        worlds.append(worlds[-1] * 2)
    return worlds


def scale_table(points: Sequence[Point], tokens: float, first: int = 0) -> Table:
    """Return the table of what has a plan; the run has `tokens` from the step number `first` on."""
    plans = [point.plan for point in points if point.plan]
    priced = bool(plans and plans[0].cluster.dollars_per_hour)
    names = ["tokens/s", "rel.", "", "MFU", "sent", "idle", "GiB", "days", "dollars" if priced else "hours"]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ["devices", *names]:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for plan in plans:
        table.add_row(f"{plan.layout.world:,}", *_cells(plan, plans[0], tokens, first))
    return table


def scale_notes(points: Sequence[Point]) -> list[str]:
    """Return what the table's columns mean, which layout each has if it isn't the settings', and what has no plan."""
    lines = [
        "tokens/s of one device; rel.: of the first; sent, idle: exchange's and the pipeline's share; !: doesn't fit"
    ]
    return lines + [f"{point.world:,}: {point.note}" for point in points if point.note]


def scale_figures(points: Sequence[Point], tokens: float, first: int = 0) -> list[dict[str, Any]]:
    """Return the same as plain numbers."""
    return [
        {
            "devices": point.world,
            "nodes": point.plan.nodes if point.plan else None,
            "tokens_per_second_per_device": point.plan.tokens_per_second if point.plan else None,
            "step_seconds": point.plan.time.seconds if point.plan else None,
            "mfu": point.plan.mfu.full if point.plan else None,
            "memory_bytes": point.plan.memory.bytes if point.plan else None,
            "fits": point.plan.fits if point.plan else False,
            "run": asdict(run_length(point.plan, tokens, first)) if point.plan else None,
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


def _cells(plan: Plan, fewest: Plan, tokens: float, first: int) -> list[str]:
    share, length = plan.tokens_per_second / fewest.tokens_per_second, run_length(plan, tokens, first)
    exchanged = plan.bounds.get("communication", 0.0) / plan.time.seconds
    cells = [
        f"{plan.tokens_per_second:,.0f}",
        f"{share:.0%}",
        "█" * max(round(share * 8), 1),
        f"{plan.mfu.full:.1%}",
        f"{exchanged:.0%}",
        f"{plan.time.parts.get('bubble', 0.0) / plan.time.seconds:.0%}",
        f"{plan.memory.bytes / GIB:.1f}" + "!" * (not plan.fits),
        f"{length.seconds / DAY:,.2f}",
    ]
    return [*cells, f"{length.device_hours if length.dollars is None else length.dollars:,.0f}"]


def _batch_sizes(config: Config, sequences: float) -> dict[str, int]:
    """Return the sizes of a batch by their settings, both ends of one that grows, for a full one of `sequences`."""
    batch = config.batch
    sizes = {"global_sequences": batch.global_sequences}
    if batch.rampup:
        sizes |= {"rampup.start": batch.rampup.start, "rampup.increment": batch.rampup.increment}
    return {name: max(round(size * sequences / batch.global_sequences), 1) for name, size in sizes.items()}


def _with_batch(config: Config, sizes: dict[str, int]) -> Config:
    batch = config.batch
    if "rampup.start" in sizes and batch.rampup:
        start, increment = sizes["rampup.start"], sizes["rampup.increment"]
        rampup = batch.rampup.model_copy(update={"start": start, "increment": increment})
        batch = batch.model_copy(update={"rampup": rampup})
    batch = batch.model_copy(update={"global_sequences": sizes.get("global_sequences", batch.global_sequences)})
    return config.model_copy(update={"batch": batch})
