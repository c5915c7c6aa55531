"""The model of a run, laid out over its ranks, and which of each microbatch a rank computes.

On one rank nothing here does more than build the model; `ternlm.parallel` does the cutting.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ternlm.config import Config
from ternlm.data.batch import Batch
from ternlm.model.decoder import CausalLM, build_empty_model, build_model
from ternlm.model.init import fill_initial
from ternlm.ops.attention import Attend, make_segment_attend
from ternlm.parallel.apply import lay_out, prepare_blocks
from ternlm.parallel.context import context_index, make_context_attend
from ternlm.parallel.mesh import Mesh
from ternlm.parallel.pieces import Piece


def build_laid_out(config: Config, mesh: Mesh, dtype: torch.dtype, compile_blocks: bool) -> CausalLM:
    """Build this rank's part of the model; its memory holds anything until it is filled or loaded.

    dtype: of the matrix products.
    """
    if mesh.layout.world == 1:
        model = build_empty_model(config.model, mesh.device)
        prepare_blocks(list(model.model.layers), config.compute, compile_blocks)
        return model
    if config.model.tie_word_embeddings:  # to_empty would make two tensors of the one
        model = build_empty_model(config.model, mesh.device)
    else:
        with torch.device("meta"):
            model = build_model(config.model)
    blocks = list(model.model.layers)
    # Tied, the head's weight is the embedding's and stays with it.
    units = blocks if config.model.tie_word_embeddings else [*blocks, model.lm_head]
    settings = (config.compute, config.parallel, config.sharding)
    lay_out(model, blocks, units, mesh, dtype, settings, compile_blocks)
    if not config.model.tie_word_embeddings:
        model.to_empty(device=mesh.device)
    return model


def fill_pieces(pieces: Sequence[Piece], config: Config) -> None:
    """Give every parameter its initial values, the same whatever the layout."""
    for piece in pieces:
        fill_initial(piece.shard().detach(), piece.name, config.model, config.seed, piece.shape, piece.offset)


class OwnPart(NamedTuple):
    """What a rank computes of a microbatch."""

    batch: Batch
    """On the rank's device."""
    attend: Attend
    rope_length: int | None
    """Longest position of the whole microbatch + 1, where the rotation depends on it and only a part is here."""


def own_part(batch: Batch, mesh: Mesh, config: Config) -> OwnPart:
    """Return the tokens of a microbatch that this rank computes, and how they attend."""
    if mesh.context is None:
        return OwnPart(batch.to(mesh.device, non_blocking=True), make_segment_attend(batch.lengths, mesh.device), None)
    method = config.parallel.context_method
    index = context_index(batch.tokens_BT.shape[1], mesh.layout.context, mesh.place.context, method)
    part = replace(
        batch,
        tokens_BT=batch.tokens_BT[:, index],
        targets_BT=batch.targets_BT[:, index],
        weights_BT=batch.weights_BT[:, index],
        positions_BT=batch.positions_BT[:, index],
    )
    attend = make_context_attend(batch.lengths, mesh.device, mesh.context, method)
    dynamic = config.model.rope_scaling.kind == "dynamic"
    rope_length = int(batch.positions_BT.max()) + 1 if dynamic else None
    return OwnPart(part.to(mesh.device, non_blocking=True), attend, rope_length)
