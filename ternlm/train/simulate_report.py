"""What `tern simulate` tells of a simulation: tables for the eye, plain numbers for programs."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table

from ternlm.config import Config
from ternlm.config.outputs import check_writable
from ternlm.config.section import ConfigError
from ternlm.planner.auto import take_best
from ternlm.planner.known import find_cluster
from ternlm.planner.units import human_bytes, human_flops
from ternlm.train.simulate import Simulation, simulate


def run_simulation(
    config: Config,
    world: int,
    rank: int = 0,
    devices_per_node: int | None = None,
    json_file: Path | None = None,
    timeline: Path | None = None,
) -> Simulation:
    """Simulate a step of one rank, print its tables, and write the files that are asked for.

    devices_per_node: those of `parallel.cluster` if not given, else 8. With `parallel.auto`, the planner lays it out.
    Raises ConfigError before anything is simulated where the layout doesn't fit or a file can't be written.
    """
    if not 0 <= rank < world:
        raise ConfigError(f"--rank = {rank} must be at least 0 and below --world-size = {world}; choose another rank")
    for option, file in (("--json", json_file), ("--timeline", timeline)):
        if file is not None:
            check_writable(option, file)
    if config.parallel.auto and not config.parallel.cluster:
        raise ConfigError(
            "parallel.auto = true needs parallel.cluster where no device is looked at; set it to a known cluster, as "
            "in parallel.cluster=h100x8, or to a file that `tern calibrate` wrote"
        )
    cluster = find_cluster(config.parallel.cluster) if config.parallel.cluster else None
    devices_per_node = devices_per_node or (cluster.devices_per_node if cluster else 8)
    config = take_best(config, world)
    with Console(stderr=True).status(f"simulating rank {rank} of {world:,}"), _torch_silent():
        simulation = simulate(config, world, rank, devices_per_node)
    Console().print(tables(simulation, config))  # first, since writing may fail yet
    if json_file is not None:
        json_file.write_text(json.dumps(figures(simulation, config), indent=2) + "\n", encoding="utf-8")
    if timeline is not None:
        simulation.write_timeline(timeline)
    return simulation


def figures(simulation: Simulation, config: Config) -> dict[str, Any]:
    """Return everything that the simulation counted, in bytes, operations and pieces, as JSON can hold it."""
    layout = simulation.layout
    return {
        "layout": {**asdict(layout), "data": layout.data},
        "place": asdict(simulation.place),
        "devices_per_node": simulation.devices_per_node,
        "microbatches": simulation.microbatches,
        "microbatch_tokens": config.batch.microbatch_sequences * config.data.seq_len,
        "dtype": simulation.dtype,
        "flops": simulation.flops,
        "memory_bytes": {"peak": simulation.peak_bytes, "rest": simulation.resting_bytes},
        "collectives": [{**asdict(one), "sent_bytes": one.sent_bytes} for one in simulation.traffic],
    }


def tables(simulation: Simulation, config: Config) -> Group:
    """Return what `tern simulate` prints."""
    layout, place = simulation.layout, simulation.place
    degrees = {"pipeline": layout.pipeline, "data": layout.data, "context": layout.context, "tensor": layout.tensor}
    lines = [
        f"Rank {place.rank} of {layout.world:,}: " + " x ".join(f"{name} {degree}" for name, degree in degrees.items()),
        f"Cut over data ranks: weights {layout.params}, gradients {layout.grads}, optimizer {layout.optimizer}",
        f"A step: {simulation.microbatches} microbatches of {config.batch.microbatch_sequences} x "
        f"{config.data.seq_len} tokens in {simulation.dtype}, {human_flops(simulation.flops)}",
    ]
    return Group(*lines, _memory(simulation), _collectives(simulation))


def _memory(simulation: Simulation) -> Table:
    """Return the table of memory, all of it in the unit that suits the peak, so that rows can be compared."""
    unit, size = ("GiB", 2**30) if sum(simulation.peak_bytes.values()) >= 2**30 else ("MiB", 2**20)
    table = Table(f"memory, {unit}", show_footer=True, box=box.SIMPLE)
    table.columns[0].footer = "all"
    for name, by_kind in (("peak", simulation.peak_bytes), ("at rest", simulation.resting_bytes)):
        table.add_column(name, f"{sum(by_kind.values()) / size:.2f}", justify="right")
    for kind, peak in simulation.peak_bytes.items():
        table.add_row(kind, f"{peak / size:.2f}", f"{simulation.resting_bytes[kind] / size:.2f}")
    return table


def _collectives(simulation: Simulation) -> Table:
    table = Table("collective", "axis", show_footer=True, box=box.SIMPLE)
    table.add_column("ranks", justify="right")
    table.add_column("nodes")
    table.add_column("count", justify="right")
    table.add_column("payload", justify="right")
    sent = sum(one.sent_bytes for one in simulation.traffic)
    table.add_column("sent", human_bytes(sent), justify="right")
    for one in sorted(simulation.traffic, key=lambda one: -one.payload_bytes):
        nodes = "between" if one.between_nodes else "inside"
        figures = f"{one.count:,}", human_bytes(one.payload_bytes), human_bytes(one.sent_bytes)
        table.add_row(one.operation, one.axis, f"{one.ranks:,}", nodes, *figures)
    return table


@contextmanager
def _torch_silent() -> Iterator[None]:
    """Hide what PyTorch warns of: functions of its own that it calls, and means to replace."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        warnings.filterwarnings("ignore", message="`torch", category=FutureWarning)
        yield
