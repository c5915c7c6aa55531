"""Which optimizer and which weight decay each parameter gets; builds the optimizers of a run."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ternlm.config.training import OptimizerConfig
from ternlm.optim.muon import Muon


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """Build the run's optimizers; together they hold every parameter exactly once.

    Each parameter group carries `peak_lr`, which the schedule multiplies.
    """
    matrices: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        in_block = ".layers." in name and parameter.ndim == 2
        (matrices if config.kind == "muon" and in_block else others).append((name, parameter))
    optimizers: list[Optimizer] = [_build_adamw(others, config)]
    if matrices:
        group = {
            "params": [parameter for _, parameter in matrices],
            "peak_lr": config.muon_lr,
            "weight_decay": config.weight_decay,
        }
        optimizers.append(Muon([group], lr=config.muon_lr, momentum=config.muon_momentum))
    return optimizers


def is_decayed(parameter: nn.Parameter, config: OptimizerConfig) -> bool:
    """Whether weight decay applies: matrices only (not norms or biases), or everything."""
    return config.decay_all or parameter.ndim >= 2


def _build_adamw(named: list[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = []
    for decayed in (True, False):
        params = [p for _, p in named if is_decayed(p, config) == decayed]
        if params:
            decay = config.weight_decay if decayed else 0.0
            groups.append({"params": params, "peak_lr": config.lr, "weight_decay": decay})
    # Fused: 50 ms against 260 for the foreach loop on 71M parameters and 2 cores.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
