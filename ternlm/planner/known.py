"""Known clusters, by name: data sheets of devices (known.toml) with the fitted constants make a Cluster.

`h100x8` is H100s, 8 on a node; `h100x8@800` the same with 800 Gb/s between nodes. A name that is a file's path is read
as what `tern calibrate` wrote. No torch here.
"""

import difflib
import functools
import re
from pathlib import Path
from typing import Literal

from ternlm.config.load import load_section, read_table
from ternlm.config.section import ConfigError, Section, setting
from ternlm.planner.cluster import Cluster, Links, Rates
from ternlm.planner.devices import peak_tflops
from ternlm.planner.fitted import Constants, fitted_constants


class Sheet(Section):
    """A device's data sheet."""

    name: str = setting(..., "as PyTorch names it")
    family: Literal["ampere", "hopper", "blackwell"] = setting(..., "whose constants hold")
    power_watt: float = setting(700.0, "power limit; matters below 700 W on hopper alone", unit="W", gt=0)
    multiprocessors: int = setting(..., "that share a product's tiles", gt=0)
    memory_gib: float = setting(..., "of one device", unit="GiB", gt=0)
    memory_gb_s: float = setting(..., "of its memory", unit="GB/s", gt=0)
    node_gb_s: float = setting(..., "to others of its node, each way", unit="GB/s", gt=0)
    network_gbit_s: float = setting(..., "of a node to others, each way", unit="Gb/s", gt=0)


class _Sheets(Section):
    sheets: dict[str, Sheet] = setting(..., "by name")


_FULL_POWER_WATT = 700.0
_TILE = 128 * 256


@functools.cache
def sheets() -> dict[str, Sheet]:
    """Return the known devices."""
    return load_section(_Sheets, Path(__file__).with_name("known.toml")).sheets


def sheets_of(device: str, memory_gib: float = 0.0) -> list[str]:
    """Return the known devices that one may be by the name PyTorch gives it, the one of most power first.

    memory_gib: as PyTorch sees it, by which devices of one name are told apart; 0: not known.
    """
    found = {name: sheet for name, sheet in sheets().items() if sheet.name == device}
    if memory_gib:
        nearest = min((abs(sheet.memory_gib - memory_gib) for sheet in found.values()), default=0.0)
        found = {name: sheet for name, sheet in found.items() if abs(sheet.memory_gib - memory_gib) == nearest}
    order = sorted(found, key=lambda name: (found[name].power_watt, found[name].memory_gb_s, found[name].node_gb_s))
    return order[::-1]


def find_cluster(name: str, attention: str = "flash2") -> Cluster:
    """Return the cluster of a name or of a file; raises ConfigError that lists the known ones."""
    path = Path(name)
    if path.is_file():
        _check_no_recipe(path)
        return load_section(Cluster, path)
    match = re.fullmatch(r"(?P<device>[a-z0-9-]+?)x(?P<number>[1-9]\d*)(@(?P<gbit>[1-9]\d*))?", name)
    if not match or match["device"] not in sheets():
        near = difflib.get_close_matches(re.sub(r"x\d*(@.*)?$", "", name), sheets(), n=1)
        hint = f"did you mean {near[0]}x8? " if near else ""
        raise ConfigError(
            f"cluster {name!r} is neither a file nor known; {hint}known are "
            f"{', '.join(f'{known}x8' for known in sheets())}, any number of devices a node, @GBIT for another "
            "network, as in h100x8@800; `tern calibrate` writes a file of this machine"
        )
    sheet, number = sheets()[match["device"]], int(match["number"])
    gbit = float(match["gbit"]) if match["gbit"] else sheet.network_gbit_s
    return make_cluster(sheet, number, gbit, fitted_constants(), attention, name)


def _check_no_recipe(path: Path) -> None:
    """Refuse a recipe by that name, instead of by all the settings that a cluster doesn't have."""
    if "model" in read_table(path):
        raise ConfigError(
            f"cluster {str(path)!r} is a recipe, with [model], and must be a known cluster, such as h100x8, or a file "
            "that `tern calibrate` wrote; name the recipe first: tern plan RECIPE --cluster CLUSTER"
        )


def make_cluster(
    sheet: Sheet, devices_per_node: int, network_gbit_s: float, c: Constants, attention: str = "flash2", name: str = ""
) -> Cluster:
    """Return what a data sheet comes to with the constants. attention: as in `Program`."""
    family = c.ampere if sheet.family == "ampere" else c.hopper
    peak = peak_tflops(sheet.name, "bfloat16")
    assert peak is not None, sheet.name  # a test holds the two tables together
    limited = peak * (sheet.power_watt / _FULL_POWER_WATT) ** c.power
    attends = limited * {"flash1": c.flash1, "flash2": 1.0, "biased": c.biased}[attention]
    return Cluster(
        name=name or sheet.name,
        device=sheet.name,
        devices_per_node=devices_per_node,
        memory_gib=sheet.memory_gib,
        reserve_gib=c.reserve_gib,
        fragmentation=c.fragmentation,
        peak_tflops=peak,
        source="data sheets (known.toml) and constants fitted to published runs (fitted.toml)",
        rates=Rates(
            matmul_tflops=limited * family.matmul,
            matmul_float8_tflops=0.0 if sheet.family == "ampere" else limited * family.matmul * c.float8,
            half_inner=c.half_inner,
            half_outer=c.half_waves * sheet.multiprocessors * _TILE,
            attention_tflops=attends * family.attention,
            attention_backward_tflops=attends * family.attention_backward,
            half_attention=c.half_attention,
            memory_gb_s=sheet.memory_gb_s * c.memory,
            launch_us=c.launch_us,
        ),
        links=Links(
            node_gb_s=sheet.node_gb_s * c.node,
            network_gb_s=network_gbit_s / 8 * c.network,
            hop_us=c.hop_us,
            broadcast_hop_us=c.broadcast_hop_us,
            contention=c.contention,
            nodes_to_half=c.nodes_to_half,
            tensor_exposed=c.tensor_exposed,
        ),
        overhead=c.overhead,
    )
