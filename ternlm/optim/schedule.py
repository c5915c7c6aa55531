"""Learning rate and beta2 over the optimizer's updates."""

import math
from collections.abc import Iterable

from torch.optim import Optimizer

from ternlm.config.training import OptimizerConfig, ScheduleConfig


def lr_factor(update: int, total: int, schedule: ScheduleConfig) -> float:
    """Return the learning rate of the 0-based `update` of `total`, as a fraction of the peak.

    Warm-up is linear and reaches the peak at its last update; the rest starts from the peak.
    """
    warmup = int(total * schedule.warmup_fraction)
    if update < warmup:
        return (update + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "wsd":
        start = total - max(int(total * schedule.decay_fraction), 1)
        progress = max(update - start, 0) / max(total - start, 1)
        return 1 - (1 - schedule.min_lr) * min(progress, 1.0)
    progress = min((update - warmup) / max(total - warmup, 1), 1.0)
    return schedule.min_lr + (1 - schedule.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def beta2_at(update: int, config: OptimizerConfig) -> float:
    """Return Adam's beta2 of the 0-based `update`: max(betas[1], 1 - n^-c) after n updates."""
    if not config.beta2_ramp or not update:
        return config.betas[1]
    return max(config.betas[1], 1 - update**-config.beta2_ramp)


def apply_schedule(
    optimizers: Iterable[Optimizer],
    update: int,
    total: int,
    config: OptimizerConfig,
    schedule: ScheduleConfig,
) -> float:
    """Set every group's learning rate and beta2 for the 0-based `update`; return the factor on the peak."""
    factor = lr_factor(update, total, schedule)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
            if "betas" in group:
                group["betas"] = (config.betas[0], beta2_at(update, config))
    return factor
