"""A run that trains adapters: its frozen base, how adapters start, and what its checkpoints are as models.

A checkpoint holds the adapters alone and says which model they belong to; that model is read anew at each start.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import find_checkpoint
from ternlm.config import AdapterConfig, Config
from ternlm.convert.detect import is_foreign
from ternlm.convert.peft import Adapter, as_frozen, check_adapter, is_adapter, read_adapter
from ternlm.convert.weights import Weights, cut
from ternlm.model.linear import adapted
from ternlm.parallel.pieces import Piece

logger = logging.getLogger(__name__)

_SIGN_ROWS = 4
"""Of each matrix that tells a model from another."""


def pinned(path: Path) -> Path:
    """Return a model's own place: of a run the checkpoint that is its newest now."""
    return path if is_foreign(path) or is_adapter(path) else find_checkpoint(path)


def fingerprint_of(weights: Weights) -> str:
    """Hash the first rows of all that the first, the middle and the last block have, and of the embedding.

    Norms alone wouldn't do: adapters that were put in leave them, and a small learning rate in bfloat16 may.
    """
    names = weights.names()
    layers = sorted({int(name.split(".")[2]) for name in names if name.startswith("model.layers.")})
    chosen = {f"model.layers.{layers[place]}." for place in (0, len(layers) // 2, -1)}
    digest = hashlib.sha256()
    for name in sorted(names):
        if name.startswith("model.layers.") and not name.startswith(tuple(chosen)):
            continue
        shape = weights.shape(name)
        rows = (min(_SIGN_ROWS, shape[0]), *shape[1:])
        digest.update(weights.read(name, (0,) * len(shape), rows).float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_base(path: Path, weights: Weights, adapter: AdapterConfig) -> dict[str, Any]:
    """Return what a checkpoint says of its adapters and of the model that they belong to."""
    settings = adapter.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {"settings": settings, "base": str(path.resolve()), "fingerprint": fingerprint_of(weights)}


def check_same_base(checkpoint: Path, saved: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    """Refuse to go on from a checkpoint with adapters of another kind, or of another model, or with or without any."""
    if (saved is None) != (now is None):
        had, has = ("no adapters", "some") if saved is None else ("adapters", "none")
        raise CheckpointError(
            f"{checkpoint}: its run trains {had}, and this one {has}; start a new run from its weights: "
            f"load.from={checkpoint} and another out"
        )
    if saved is None or now is None:
        return
    for name in ("kind", "rank", "alpha", "rank_stabilized", "targets", "base", "block_size"):
        before, after = saved["settings"].get(name), now["settings"].get(name)
        if before != after:
            raise CheckpointError(
                f"{checkpoint}: adapter.{name} was {before} and is {after}; set it as it was, or choose another out"
            )
    if saved["fingerprint"] != now["fingerprint"]:
        raise CheckpointError(
            f"{checkpoint}: its adapters belong to {saved['base']}, whose weights aren't those of {now['base']}; set "
            "load.from to the model that the run began with"
        )


@torch.no_grad()
def fill_frozen(model: Any, pieces: Sequence[Piece], weights: Weights) -> None:
    """Fill what isn't trained of a model with adapters, in place."""
    for piece in pieces:
        shard = piece.shard().detach()
        if not piece.parameter.requires_grad and shard.numel():
            shard.copy_(weights.read(piece.name, tuple(piece.offset), tuple(shard.shape)))
    for name, linear in adapted(model).items():
        if linear.packed is not None:
            linear.packed.fill(weights.read(f"{name}.weight").to(linear.packed.codes.device))


@torch.no_grad()
def start_adapters(trained: Sequence[Piece], weights: Weights, config: Config) -> None:
    """Give adapters the values of the one that they go on from, if any, and DoRA its lengths; in place."""
    adapter = config.adapter
    assert adapter is not None
    given = read_start(config)
    for piece in trained:
        shard = piece.shard().detach()
        if not shard.numel():
            continue
        if given:
            shard.copy_(cut(given.tensors[piece.name], tuple(piece.offset), tuple(shard.shape)))
        elif piece.name.endswith(".magnitude"):
            weight = as_frozen(weights.read(piece.name.removesuffix("magnitude") + "weight"), adapter)
            lengths = torch.linalg.vector_norm(weight, dim=1)
            shard.copy_(cut(lengths, tuple(piece.offset), tuple(shard.shape)))


def read_start(config: Config) -> Adapter | None:
    """Read the adapter that a run goes on from, if any; raises ConvertError where it isn't of these settings."""
    adapter = config.adapter
    if adapter is None or adapter.start is None:
        return None
    path = Path(adapter.start)
    given = read_adapter(path)
    for name in ("kind", "rank", "alpha", "rank_stabilized"):
        theirs, ours = getattr(given.config, name), getattr(adapter, name)
        if theirs != ours:
            raise CheckpointError(f"{path}: its {name} is {theirs}, and adapter.{name} is {ours}; set it to {theirs}")
    if set(given.config.targets) != set(adapter.targets):
        raise CheckpointError(
            f"{path}: is of {', '.join(given.config.targets)}, and adapter.targets has {', '.join(adapter.targets)}; "
            f"set adapter.targets={list(given.config.targets)}"
        )
    check_adapter(path, given, config.model)
    return given


def adapter_in(weights: Weights, state: dict[str, Any]) -> Adapter | None:
    """Return the adapter that a checkpoint holds, None where it holds a whole model."""
    described = state.get("adapter")
    if not described:
        return None
    settings = AdapterConfig.model_validate(described["settings"], strict=False)
    tensors = {name: weights.read(name) for name in weights.names()}
    return Adapter(settings, tensors, described["base"])


def find_base(checkpoint: Path, described: dict[str, Any]) -> Path:
    """Return where the model is that a checkpoint's adapters belong to; raises CheckpointError where it's gone."""
    path = Path(described["base"])
    if not path.exists():
        raise CheckpointError(
            f"{checkpoint}: holds adapters of {path}, which isn't there any more; put it back, or name it: --base MODEL"
        )
    return path
