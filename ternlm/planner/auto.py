"""`parallel = "auto"`: the planner chooses a run's layout. No torch here."""

import logging

from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.planner.choice import choice_of
from ternlm.planner.cluster import Cluster
from ternlm.planner.known import find_cluster, sheets
from ternlm.planner.search import Search

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.92
"""Of a device's memory, that a chosen layout may be predicted to need."""


def take_best(config: Config, world: int, device: str = "", devices_per_node: int = 8) -> Config:
    """Return the settings with the fastest layout of `world` devices where `parallel.auto` is set, else unchanged.

    device: as PyTorch names it, to plan for where `parallel.cluster` names nothing else. The same on every rank. Raises
    ConfigError where the device isn't known or no layout fits.
    """
    if not config.parallel.auto:
        return config
    cluster = cluster_of(config, "parallel.auto = true", device, devices_per_node)
    # Peak memory is predicted to about 5%: a run that starts by itself keeps away from the limit.
    careful = cluster.model_copy(update={"memory_gib": cluster.memory_gib * MEMORY_SHARE})
    choice, plan = Search(config, careful, world).run(1).best[0]
    chosen = choice.checked_in(config)
    logger.info(
        "parallel.auto chose %s: %.0f tokens/s a device predicted on %s",
        " ".join(choice.overrides(choice_of(config))) or "the recipe's layout",
        plan.tokens_per_second,
        cluster.name,
    )
    return chosen


def cluster_of(config: Config, asked: str, device: str, devices_per_node: int) -> Cluster:
    """Return what `parallel.cluster` names, else the known cluster of such devices.

    asked: the setting that needs it. device: as PyTorch names it. Raises ConfigError where it isn't known.
    """
    cluster = known_cluster(config, device, devices_per_node)
    if cluster:
        return cluster
    raise ConfigError(
        f"{asked} doesn't know the device {device!r}; set parallel.cluster to what comes next to it, of "
        f"{', '.join(f'{name}x{devices_per_node}' for name in sheets())}, or to a file that `tern calibrate` wrote"
    )


def known_cluster(config: Config, device: str, devices_per_node: int) -> Cluster | None:
    """Return what `parallel.cluster` names, else the known cluster of such devices; None where there is none."""
    if config.parallel.cluster:
        return find_cluster(config.parallel.cluster)
    for name, sheet in sheets().items():
        if sheet.name == device:
            return find_cluster(f"{name}x{devices_per_node}")
    return None
