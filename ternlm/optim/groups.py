"""Which optimizer and which weight decay each parameter gets; builds the optimizers of a run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ternlm.config.training import OptimizerConfig
from ternlm.optim.muon import Muon
from ternlm.parallel.mesh import Mesh
from ternlm.parallel.pieces import Piece, join_piece


def build_optimizers(pieces: Sequence[Piece], config: OptimizerConfig, mesh: Mesh) -> list[Optimizer]:
    """Build the run's optimizers; together they hold every piece of this rank exactly once.

    Collective where matrices are cut and optimized by Muon: every rank must then step at the same time.
    Each parameter group carries `peak_lr`, which the schedule multiplies.
    """
    matrices: list[Piece] = []
    others: list[Piece] = []
    for piece in pieces:
        in_block = ".layers." in piece.name and len(piece.shape) == 2
        (matrices if config.kind == "muon" and in_block else others).append(piece)
    # Of low-rank adapters all may be matrices of blocks.
    optimizers: list[Optimizer] = [_build_adamw(others, config)] if others else []
    if matrices:
        group = {
            "params": [piece.tensor for piece in matrices],
            "peak_lr": config.muon_lr,
            "weight_decay": config.weight_decay,
        }
        by_tensor: dict[Tensor, Piece] = {piece.tensor: piece for piece in matrices}
        cut = any(piece.tensor.shape != piece.shape for piece in matrices)
        optimizers.append(
            Muon(
                [group],
                lr=config.muon_lr,
                momentum=config.muon_momentum,
                join=(lambda tensor, direction: join_piece(by_tensor[tensor], direction, mesh)) if cut else None,
            )
        )
    return optimizers


def is_decayed(piece: Piece, config: OptimizerConfig) -> bool:
    """Whether weight decay applies: matrices only (not norms or biases), or everything."""
    return config.decay_all or len(piece.shape) >= 2


def _build_adamw(pieces: Sequence[Piece], config: OptimizerConfig) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = []
    for decayed in (True, False):
        params = [piece.tensor for piece in pieces if is_decayed(piece, config) == decayed]
        if params:
            decay = config.weight_decay if decayed else 0.0
            groups.append({"params": params, "peak_lr": config.lr, "weight_decay": decay})
    # Fused: 50 ms against 260 for the foreach loop on 71M parameters and 2 cores.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
