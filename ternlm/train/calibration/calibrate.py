"""`tern calibrate`: measure this machine, or all ranks under torchrun, and write the planner a cluster file.

What is timed is in kernels.py and links.py, what becomes of it in fit.py, the file in cluster_file.py.
"""

import logging
import os
import platform
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from ternlm.config.outputs import check_writable
from ternlm.config.section import ConfigError
from ternlm.config.training import ComputeConfig
from ternlm.parallel.group import process_group
from ternlm.parallel.launch import Launch, find_launch, log_from
from ternlm.planner.cluster import Cluster, NumberFormat
from ternlm.planner.devices import peak_tflops
from ternlm.train.calibration.cluster_file import make_cluster, write_cluster
from ternlm.train.calibration.kernels import Sizes, sizes_for
from ternlm.train.calibration.links import LinkFigures, measure_links, node_size
from ternlm.train.calibration.rates import DeviceFigures, measure_device, slowest
from ternlm.train.precision import choose_device, choose_dtype

logger = logging.getLogger(__name__)

CALM = 0.75
"""Share of disturbed samples above which figures are said to be too low. A quiet machine's own daemons make a third,
two ranks on its two cores 0.6, another program more than 0.8."""


def calibrate(
    out: Path, device: str = "auto", dtype: str = "auto", seconds: float = 60.0, sizes: Sizes | None = None
) -> Cluster:
    """Measure for about `seconds` and write the cluster file `out`; return what was written.

    device, dtype: as `compute.device` and `compute.dtype`. sizes: of what is timed; by the device if not given.
    Collective under torchrun or Slurm: all ranks measure at once, rank 0 writes the medians.
    Raises ConfigError for what can't be measured or written.
    """
    if not seconds >= 1:
        raise ConfigError(f"--seconds = {seconds:g} must be at least 1; a minute gives steady figures")
    launch = find_launch()
    if launch.rank == 0:  # which writes; others' nodes may have no such folder
        check_writable("--out", out)
    node_size(launch)
    log_from(launch)
    chosen = choose_device(device, launch.local_rank if launch.world > 1 else None)
    compute = ComputeConfig.model_validate({"device": chosen.type, "dtype": dtype})
    number_format = choose_dtype(compute, chosen)
    sizes = sizes or sizes_for(chosen)
    with process_group(launch, chosen, 10.0):
        share = 1.0 if launch.world == 1 else 0.7
        figures = measure_device(chosen, number_format, sizes, share * seconds)
        links = measure_links(launch, chosen, (1 - share) * seconds)
        gathered: list[DeviceFigures] = [figures] * launch.world
        if launch.world > 1:
            dist.all_gather_object(gathered, figures)
    cluster = _describe(chosen, number_format, gathered, links, launch)
    if launch.rank == 0:
        write_cluster(out, cluster, _how(gathered[0], links, launch))
        _report(out, cluster, gathered)
    return cluster


def _describe(
    device: torch.device, dtype: torch.dtype, figures: list[DeviceFigures], links: LinkFigures, launch: Launch
) -> Cluster:
    middle = figures[0].typical(figures[1:])
    number_format = str(dtype).removeprefix("torch.")
    peak = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        memory = torch.cuda.get_device_properties(device).total_memory
        peak = peak_tflops(name, number_format)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // links.devices_per_node
    source = f"tern calibrate: torch {torch.__version__}, {name}, {os.cpu_count()} cores, {number_format}"
    if launch.world > 1:
        source += f", {links.nodes} nodes of {links.devices_per_node} ranks"
    shown = f"{name} x {links.devices_per_node}" if launch.world > 1 else name
    return make_cluster(shown, name, memory / 2**30, peak, cast(NumberFormat, number_format), source, middle, links)


def _how(figures: DeviceFigures, links: LinkFigures, launch: Launch) -> dict[str, str]:
    ranks = f"; median of {launch.world} ranks" if launch.world > 1 else ""
    how = {f"rates.{name}": text + ranks for name, text in figures.how.items()}
    how["peak_tflops"] = "the data sheet's, else of the fastest product"
    if links.contention:
        how["links.contention"] = "a CPU's cores do the exchanging too, so that nothing is hidden; not measured"
    if links.node_gb_s:
        figure = f"{links.node_latency_us:.0f} us for a small one"
        how["links.node_gb_s"] = "; ".join(
            ["median of collectives of 16 and 64 MiB", figure, *(x for x in links.by_operation if x.startswith("node"))]
        )
    if links.network_gb_s:
        how["links.network_gb_s"] = "; ".join(
            ["one rank of each node in a group, all at once", *(x for x in links.by_operation if x.startswith("acr"))]
        )
        how["links.hop_us"] = "collectives of 4 KiB between nodes, by hops"
    return how


def _report(out: Path, cluster: Cluster, figures: list[DeviceFigures]) -> None:
    rates = cluster.rates
    assert rates is not None
    logger.info(
        "%s: products %.3g TFLOPS, attention %.3g, memory %.3g GB/s",
        out,
        rates.matmul_tflops,
        rates.attention_tflops,
        rates.memory_gb_s,
    )
    for rank in slowest(figures):
        logger.warning("rank %d's products are over 10%% slower than the median's; see what else runs there", rank)
    worst = max(one.disturbance for one in figures)
    if worst > CALM:
        logger.warning(
            "other processes took the processor during %.0f%% of the samples: the rates are too low; calibrate again "
            "on a quiet machine",
            100 * worst,
        )


def _processor() -> str:
    """Return the processor's name, as Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
