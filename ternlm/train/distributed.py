"""The model of a run, laid out over its ranks, and how microbatches go through it.

On one rank this builds the model and calls it; `ternlm.parallel` does the cutting and the pipeline.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ternlm.config import Config
from ternlm.config.adapter import AdapterConfig
from ternlm.config.stages import own_stages
from ternlm.data.batch import Batch
from ternlm.model.decoder import CausalLM, build_empty_model, build_model
from ternlm.model.init import fill_initial
from ternlm.model.linear import adapt
from ternlm.ops.attention import Attend, make_segment_attend
from ternlm.parallel.apply import lay_out, prepare_blocks
from ternlm.parallel.context import context_index, make_context_attend
from ternlm.parallel.mesh import Mesh
from ternlm.parallel.pieces import Piece
from ternlm.parallel.pipeline import Pipeline, Reduction, Travelling
from ternlm.parallel.sharding import sync_gradients
from ternlm.parallel.stages import Microbatch, Stage, cut_stage, join_stages
from ternlm.train.objective import Loss, LossFn

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class LaidOut:
    """This rank's part of the model. Its methods are collective: every rank must call them with its microbatches."""

    config: Config
    mesh: Mesh
    model: Any
    """What holds the parameters, by the whole model's names: a CausalLM, or the joined stages of a pipeline."""
    pipeline: Pipeline | None = None
    _told: dict[int, list[str]] = field(default_factory=dict)

    def metric_names(self, losses: Sequence[Loss], num_types: int) -> list[str]:
        """Return the names of the losses' metrics, also where the losses are on another rank of the pipeline.

        num_types: of data, which tells training from validation. The last stage's rank is asked once.
        """
        if self.pipeline is None:
            return list(losses[0].metrics)
        if num_types not in self._told:
            self._told[num_types] = self.mesh.tell_pipeline(list(losses[0].metrics) if losses else None)
        return self._told[num_types]

    def backward(
        self, microbatches: Sequence[Batch], loss_fn: LossFn, autocast: Autocast, constant: float
    ) -> list[Loss]:
        """Add to the gradients those of the losses' sum times `constant`; return the losses, detached.

        In a pipeline only the rank with the last stage gets them.
        """
        if self.pipeline is not None:
            return self.pipeline.run([self._fed(batch, loss_fn, constant) for batch in microbatches], autocast)
        losses = []
        for batch in microbatches:
            sync_gradients(self.model, self.mesh, last=batch is microbatches[-1])
            with autocast():
                loss = self._loss(batch, loss_fn)
            (loss.total * constant).backward()
            losses.append(_detached(loss))
        return losses

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], loss_fn: LossFn, autocast: Autocast) -> list[Loss]:
        """Return the losses of any number of microbatches, without gradients; as for `backward`."""
        if self.pipeline is not None:
            return self.pipeline.evaluate([self._fed(batch, loss_fn, 1.0) for batch in batches], autocast)
        losses = []
        for batch in batches:
            with autocast():
                losses.append(self._loss(batch, loss_fn))
        return losses

    def _loss(self, batch: Batch, loss_fn: LossFn) -> Loss:
        own = own_part(batch, self.mesh, self.config)
        hidden_BTD = self.model(own.batch.tokens_BT, own.batch.positions_BT, own.attend, own.rope_length)
        return loss_fn(self.model.lm_head, hidden_BTD, own.batch)

    def _fed(self, batch: Batch, loss_fn: LossFn, constant: float) -> Microbatch:
        own = own_part(batch, self.mesh, self.config)

        def stage_loss(head: Any, hidden_BTD: Tensor) -> tuple[Tensor, Loss]:
            loss = loss_fn(head, hidden_BTD, own.batch)
            return loss.total * constant, _detached(loss)

        return Microbatch(own.batch.tokens_BT, own.batch.positions_BT, own.attend, stage_loss, own.rope_length)


def build_laid_out(config: Config, mesh: Mesh, dtype: torch.dtype, compile_blocks: bool) -> LaidOut:
    """Build this rank's part of the model; its memory holds anything until it is filled or loaded.

    dtype: of the matrix products.
    """

    def change(model: CausalLM) -> None:
        if config.adapter:
            adapt(model, config.adapter, frozen_dtype(config.adapter, dtype))

    if mesh.layout.world == 1:
        model = build_empty_model(config.model, mesh.device, change)
        prepare_blocks(list(model.model.layers), config.compute, compile_blocks)
        return LaidOut(config, mesh, model)
    tied = config.model.tie_word_embeddings
    if tied:  # to_empty would make two tensors of the one
        model = build_empty_model(config.model, mesh.device, change)
    else:
        with torch.device("meta"):
            model = build_model(config.model)
        change(model)
    settings = (config.compute, config.parallel, config.sharding)
    stages = _cut_stages(model, config, mesh) if mesh.pipeline is not None else {}
    part: nn.Module = join_stages(stages.values()) if stages else model
    # What FSDP takes as roots, each with the units that it gathers by themselves.
    roots: list[tuple[Any, list[nn.Module]]] = []
    for root in stages.values() if stages else [model]:
        units = list(root.model.layers)
        if not tied and (not isinstance(root, Stage) or root.last):
            units.append(root.lm_head)
        roots.append((root, units))
    blocks = list(part.model.layers)  # type: ignore[union-attr,arg-type]
    lay_out(part, blocks, roots, mesh, dtype, settings, compile_blocks)
    if not tied:
        part.to_empty(device=mesh.device)
    pipeline = _make_pipeline(stages, config, mesh, dtype) if stages else None
    return LaidOut(config, mesh, part, pipeline)


def fill_pieces(pieces: Sequence[Piece], config: Config) -> None:
    """Give every parameter its initial values, the same whatever the layout."""
    for piece in pieces:
        fill_initial(piece.shard().detach(), piece.name, config.model, config.seed, piece.shape, piece.offset)


def frozen_dtype(adapter: AdapterConfig, dtype: torch.dtype) -> torch.dtype:
    """Return the format of frozen weights where the products are in `dtype`, those in 4 bits aside."""
    return dtype if adapter.base in ("auto", "nf4") else getattr(torch, adapter.base)


class OwnPart(NamedTuple):
    """What a rank computes of a microbatch."""

    batch: Batch
    """On the rank's device."""
    attend: Attend
    rope_length: Tensor | None
    """Length (tokens) of each token's segment, (B, T), where the rotation depends on it: each is scaled by its own."""


def own_part(batch: Batch, mesh: Mesh, config: Config) -> OwnPart:
    """Return the tokens of a microbatch that this rank computes, and how they attend."""
    dynamic = config.model.rope_scaling.kind == "dynamic"
    lengths_BT = batch.segment_lengths_BT() if dynamic else None
    if mesh.context is None:
        attend = make_segment_attend(batch.lengths, mesh.device)
        part = batch
    else:
        method = config.parallel.context_method
        index = context_index(batch.tokens_BT.shape[1], mesh.layout.context, mesh.place.context, method)
        attend = make_context_attend(batch.lengths, mesh.device, mesh.context, method)
        part = replace(
            batch,
            tokens_BT=batch.tokens_BT[:, index],
            targets_BT=batch.targets_BT[:, index],
            weights_BT=batch.weights_BT[:, index],
            positions_BT=batch.positions_BT[:, index],
        )
        lengths_BT = lengths_BT[:, index] if lengths_BT is not None else None
    if lengths_BT is not None:
        lengths_BT = lengths_BT.to(mesh.device, non_blocking=True)
    return OwnPart(part.to(mesh.device, non_blocking=True), attend, lengths_BT)


def _detached(loss: Loss) -> Loss:
    return Loss(loss.total.detach(), loss.tokens, loss.metrics)


def _cut_stages(model: CausalLM, config: Config, mesh: Mesh) -> dict[int, Stage]:
    own = own_stages(config, mesh.layout.pipeline, mesh.place.pipeline)
    return {stage.number: cut_stage(model, stage.layers, stage.first, stage.last) for stage in own}


def _make_pipeline(stages: dict[int, Stage], config: Config, mesh: Mesh, dtype: torch.dtype) -> Pipeline:
    assert mesh.pipeline is not None
    degree = mesh.layout.tensor if config.parallel.sequence else 1
    return Pipeline(
        stages,
        config.parallel.pipeline_schedule,
        mesh.pipeline,
        mesh.device,
        Travelling(config.model.hidden_size, dtype, degree),
        Reduction(each_microbatch=mesh.layout.grads > 1, reshard=mesh.layout.reshard),
    )
