"""`parallel = "auto"`: the planner chooses a run's layout. No torch here."""

import logging
from dataclasses import replace

from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.planner.choice import choice_of
from ternlm.planner.cluster import Cluster
from ternlm.planner.known import find_cluster, sheets, sheets_of
from ternlm.planner.plan import MEMORY_ERROR
from ternlm.planner.search import Search

logger = logging.getLogger(__name__)


def take_best(
    config: Config, world: int, device: str = "", devices_per_node: int = 8, memory_gib: float = 0.0
) -> Config:
    """Return the settings with the fastest layout of `world` devices where `parallel.auto` is set, else unchanged.

    device, memory_gib: as PyTorch sees it, to plan for where `parallel.cluster` names nothing else. The same on every
    rank. Raises ConfigError where the device isn't known or no layout fits.
    """
    if not config.parallel.auto:
        return config
    cluster = cluster_of(config, "parallel.auto = true", device, devices_per_node, memory_gib)
    # A run that starts by itself keeps away from the limit.
    careful = cluster.model_copy(update={"memory_gib": cluster.memory_gib * (1 - MEMORY_ERROR)})
    choice, plan = Search(config, careful, world).run(1).best[0]
    chosen, before = choice.checked_in(config), replace(choice_of(config), auto=False)
    logger.info(
        "parallel.auto chose %s: %.0f tokens/s a device predicted on %s",
        " ".join(choice.overrides(before, world)) or "the recipe's layout",
        plan.tokens_per_second,
        cluster.name,
    )
    return chosen


def cluster_of(config: Config, asked: str, device: str, devices_per_node: int, memory_gib: float = 0.0) -> Cluster:
    """Return what `parallel.cluster` names, else the known cluster of such devices.

    asked: the setting that needs it. device, memory_gib: as PyTorch sees it; where that may be several, says which is
    taken. Raises ConfigError where it isn't known.
    """
    cluster = known_cluster(config, device, devices_per_node, memory_gib)
    if not cluster:
        raise ConfigError(
            f"{asked} doesn't know the device {device!r}; set parallel.cluster to what comes next to it, of "
            f"{', '.join(f'{name}x{devices_per_node}' for name in sheets())}, or to a file that `tern calibrate` wrote"
        )
    names = [f"{name}x{devices_per_node}" for name in sheets_of(device, memory_gib)]
    if len(names) > 1 and not config.parallel.cluster:
        logger.info(
            "%s: %r may be %s; taken for one of full power, %s; if its power is limited, set parallel.cluster=%s",
            asked,
            device,
            " or ".join(names),
            names[0],
            names[-1],
        )
    return cluster


def known_cluster(config: Config, device: str, devices_per_node: int, memory_gib: float = 0.0) -> Cluster | None:
    """Return what `parallel.cluster` names, else the known cluster of such devices; None where there is none.

    device, memory_gib: as PyTorch sees it; of several that it may be, the one of most power is taken.
    """
    if config.parallel.cluster:
        return find_cluster(config.parallel.cluster)
    name = next(iter(sheets_of(device, memory_gib)), None)
    return find_cluster(f"{name}x{devices_per_node}") if name else None
