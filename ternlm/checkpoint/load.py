"""Read checkpoints: the facts, the weights alone, or everything a resumed run needs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from ternlm.checkpoint.causes import cause_of
from ternlm.checkpoint.checksums import check_files
from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import find_checkpoint
from ternlm.checkpoint.save import STATE_FILE
from ternlm.checkpoint.tensors import LoadPlanner, model_tensors, one_process, optimizer_tensors
from ternlm.config.model import ModelConfig
from ternlm.parallel.mesh import Mesh
from ternlm.parallel.pieces import Piece


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the facts saved beside the tensors; `checkpoint` may also be a run's folder."""
    path = find_checkpoint(checkpoint) / STATE_FILE
    check_files(path.parent, [STATE_FILE])
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise CheckpointError(f"{path}: can't be read ({reason}); take another checkpoint") from reason


def read_model_config(checkpoint: Path) -> ModelConfig:
    """Read the shape of the model in a checkpoint."""
    try:
        # JSON has lists where the settings have tuples and no types to be strict about.
        return ModelConfig.model_validate(read_state(checkpoint)["model"], strict=False)
    except (KeyError, TypeError, ValueError) as trouble:
        if isinstance(trouble, CheckpointError):
            raise
        raise CheckpointError(
            f"{checkpoint}: its {STATE_FILE} doesn't describe a model ({cause_of(trouble)}); take another checkpoint"
        ) from trouble


def load_weights(pieces: Sequence[Piece], checkpoint: Path, mesh: Mesh) -> None:
    """Fill the model's parameters, in place, from a checkpoint of the same shape, whatever layout saved it.

    Collective: every rank must call it.
    """
    _load(model_tensors(pieces), find_checkpoint(checkpoint), mesh)


def load_everything(pieces: Sequence[Piece], optimizers: Sequence[Optimizer], checkpoint: Path, mesh: Mesh) -> None:
    """Fill the model's parameters and the optimizers' states, in place. Collective: every rank must call it."""
    _load({**model_tensors(pieces), **optimizer_tensors(pieces, optimizers)}, find_checkpoint(checkpoint), mesh)


def check_same_model(checkpoint: Path, model: ModelConfig, tokenizer_fingerprint: str | None) -> None:
    """Refuse a checkpoint's weights of another shape or of another tokenizer, as `check_model`."""
    fingerprint = read_state(checkpoint)["tokenizer"]["fingerprint"]
    check_model(checkpoint, read_model_config(checkpoint), fingerprint, model, tokenizer_fingerprint)


def check_model(
    path: Path, saved: ModelConfig, saved_fingerprint: str | None, model: ModelConfig, fingerprint: str | None
) -> None:
    """Refuse weights of another shape or of another tokenizer, naming what differs.

    The fingerprints: None where the weights' source, or the data, doesn't tell its tokenizer; then only the shape is
    compared.
    """
    # None of these shapes a weight; a longer context may even need another base.
    ignored = {"preset", "init", "max_position_embeddings", "rope_scaling", "rope_theta", "rms_norm_eps"}
    names = [name for name in ModelConfig.model_fields if name not in ignored | {"head_dim"}]
    for name in (*names, "head_dim"):  # which mostly follows from the others
        theirs, ours = _resolved(saved, name), _resolved(model, name)
        if theirs != ours:
            raise CheckpointError(
                f"{path} was trained with model.{name} = {theirs}, this run has {ours}; "
                f"set model.{name} to {theirs} or start from other weights"
            )
    if None not in (saved_fingerprint, fingerprint) and saved_fingerprint != fingerprint:
        raise CheckpointError(
            f"{path} was trained with another tokenizer (fingerprint {saved_fingerprint}, here {fingerprint}): its ids "
            "mean other tokens; prepare the data with the tokenizer in that folder, or start from other weights"
        )


def _resolved(config: ModelConfig, name: str) -> Any:
    resolved = {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    return resolved.get(name, getattr(config, name))


def _load(tensors: dict[str, Any], folder: Path, mesh: Mesh) -> None:
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{folder}: its file .metadata is missing; take another checkpoint")
    check_files(folder, share=(mesh.place.rank, mesh.layout.world))
    try:
        with one_process():
            dcp.load(
                tensors,
                storage_reader=dcp.FileSystemReader(folder),
                planner=LoadPlanner(),
                process_group=mesh.control,
                no_dist=mesh.control is None,
            )
    except (CheckpointException, OSError, RuntimeError, ValueError) as trouble:
        raise CheckpointError(f"{folder}: can't be loaded ({cause_of(trouble)}); take another checkpoint") from trouble
