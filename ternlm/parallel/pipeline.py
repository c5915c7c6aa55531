"""Run a model's stages over the ranks of a pipeline, with PyTorch's schedules.

A rank gives its stages all microbatches of a step; `Pipeline.run` moves activations and gradients between ranks and
leaves the gradients' sums in the parameters. Where stages come from is in `stages.py`; what is done with gradients
and losses afterwards is the caller's.

Shapes: B batch, T tokens, D hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from ternlm.config.stages import is_v_shaped
from ternlm.parallel.stages import Microbatch, Stage

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Travelling:
    """What goes from stage to stage: (B, T / sequence_degree, hidden_size) of `dtype`."""

    hidden_size: int
    dtype: torch.dtype
    sequence_degree: int = 1
    """Over how many tensor-parallel ranks the residual stream is cut along T."""

    def shape(self, microbatch: Microbatch) -> tuple[int, int, int]:
        """Return the shape for this microbatch."""
        B, T = microbatch.tokens_BT.shape
        return B, T // self.sequence_degree, self.hidden_size


@dataclass(frozen=True)
class Reduction:
    """When gradients of FSDP modules are reduced over data ranks, and weights given back."""

    each_microbatch: bool = False
    """Reduce after each backward, for gradients that are kept cut; else once, in the last backward of a step."""
    reshard: bool = False
    """Give weights back after each backward; else only after a step's last."""


class Pipeline:
    """This rank's stages and how they are run. Every method is collective over `group`."""

    def __init__(
        self,
        stages: Mapping[int, Stage],
        schedule: str,
        group: ProcessGroup,
        device: torch.device,
        travelling: Travelling,
        reduction: Reduction | None = None,
    ) -> None:
        """`stages`: by number, those of `stages_of`, after all that changes modules (tensor, recompute, FSDP)."""
        self.stages = dict(sorted(stages.items()))
        self.schedule, self.group, self.device, self.travelling = schedule, group, device, travelling
        self.reduction = reduction or Reduction()
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.num_stages = self.ranks * len(stages)
        self._v_shaped = is_v_shaped(schedule, len(stages))
        self._steps: dict[tuple[int, tuple[int, ...]], tuple[list[_FedStage], Any]] = {}
        for stage in self.stages.values():
            _prefetch_in_order(stage)

    @property
    def last_rank(self) -> int:
        """The rank of `group` that has the last stage, hence the losses."""
        return self._rank_of(self.num_stages - 1)

    def run(self, microbatches: Sequence[Microbatch], autocast: Autocast = nullcontext) -> list[Any]:
        """Run forward and backward of all microbatches, adding to the gradients.

        Returns what each microbatch's `loss` gave to be returned, on the rank with the last stage; nothing elsewhere.
        """
        stages, schedule = self._prepare(microbatches)
        for stage in stages:
            stage.microbatches, stage.autocast = microbatches, autocast
        schedule.step(target=torch.zeros(len(microbatches)))  # the stages know their inputs
        for stage in stages:
            stage.microbatches = ()
        return self._kept(microbatches)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], autocast: Autocast = nullcontext) -> list[Any]:
        """Run forward only, of any number of microbatches; returns as `run`."""
        # As many microbatches at a time as there are ranks fill the pipeline, and bound what waits to be sent.
        for start in range(0, len(microbatches), self.ranks):
            self._forward_window(microbatches[start : start + self.ranks], autocast)
        for stage in self.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # else what reads the parameters next would find them whole
        return self._kept(microbatches)

    def _kept(self, microbatches: Sequence[Microbatch]) -> list[Any]:
        return [microbatch.kept for microbatch in microbatches] if self.rank == self.last_rank else []

    def _rank_of(self, stage: int) -> int:
        turn, rank = divmod(stage, self.ranks)
        return self.ranks - 1 - rank if self._v_shaped and turn else rank

    def _prepare(self, microbatches: Sequence[Microbatch]) -> tuple[list["_FedStage"], Any]:
        shapes = sorted({self.travelling.shape(microbatch) for microbatch in microbatches})
        if len(shapes) != 1:
            raise ValueError(f"the microbatches of a step must have one shape, not {shapes}")
        shape = shapes[0]
        key = len(microbatches), shape
        if key not in self._steps:
            travelling = torch.empty(shape, dtype=self.travelling.dtype, device="meta", requires_grad=True)
            reduction = None if self.schedule == "zero_bubble" else self.reduction
            stages = [
                _FedStage(stage, index, self.num_stages, self.device, self.group, travelling, reduction)
                for index, stage in self.stages.items()
            ]
            self._steps[key] = stages, self._make_schedule(stages, len(microbatches))
        return self._steps[key]

    def _make_schedule(self, stages: list["_FedStage"], count: int) -> Any:
        if self.schedule == "1f1b":
            return Schedule1F1B(stages[0], count, loss_fn=_given_loss, scale_grads=False)
        makers = {
            "interleaved": ScheduleInterleaved1F1B,
            "zero_bubble": ScheduleZBVZeroBubble if self._v_shaped else ScheduleInterleavedZeroBubble,
        }
        return makers[self.schedule](list(stages), count, loss_fn=_given_loss, scale_grads=False)

    def _forward_window(self, microbatches: Sequence[Microbatch], autocast: Autocast) -> None:
        sent: list[tuple[Tensor, Any]] = []
        handed: list[Tensor] = []
        for index, stage in self.stages.items():
            come: list[tuple[Tensor, Any]] = []
            if index and index - 1 not in self.stages:
                # All receives before the first send: two ranks that send to each other must agree on an order.
                come = [self._receive(index - 1, microbatch) for microbatch in microbatches]
            outputs: list[Tensor] = []
            for number, microbatch in enumerate(microbatches):
                if come:
                    come[number][1].wait()
                inputs = (come[number][0],) if come else (handed[number],) if index else ()
                with autocast():
                    outputs.append(stage(*inputs, microbatch=microbatch))
                if index + 1 < self.num_stages:
                    _check_output(outputs[-1], self.travelling.shape(microbatch), self.travelling.dtype, index)
                    if index + 1 not in self.stages:
                        sent.append((outputs[-1], self._send(index + 1, outputs[-1])))
            handed = outputs
        for _, work in sent:
            work.wait()

    def _receive(self, stage: int, microbatch: Microbatch) -> tuple[Tensor, Any]:
        buffer = torch.empty(self.travelling.shape(microbatch), dtype=self.travelling.dtype, device=self.device)
        return buffer, dist.irecv(buffer, group=self.group, group_src=self._rank_of(stage))

    def _send(self, stage: int, output: Tensor) -> Any:
        return dist.isend(output, group=self.group, group_dst=self._rank_of(stage))


def _prefetch_in_order(stage: Stage) -> None:
    """Let each FSDP block gather the one before it in backward.

    Left alone, FSDP takes the order of the newest forward, which under a pipeline is another microbatch's.
    """
    blocks = [*stage.model.layers, *([stage.lm_head] if stage.last else [])]
    units = [block for block in blocks if isinstance(block, FSDPModule)]
    for before, unit in zip([*units[:1], *units], units, strict=False):
        unit.set_modules_to_backward_prefetch([before])  # the first one itself: an empty list would mean "guess"


def _given_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the last stage's output, which is the loss already."""
    return output


def _check_output(output: Tensor, shape: tuple[int, ...], dtype: torch.dtype, stage: int) -> None:
    """Refuse what the next stage, which has made room already, would take for something else."""
    if tuple(output.shape) != shape or output.dtype != dtype:
        raise ValueError(
            f"stage {stage} gave {tuple(output.shape)} {output.dtype}, and {shape} {dtype} is what travels; correct "
            "the pipeline's `travelling`"
        )


class _FedStage(PipelineStage):
    """PyTorch's stage, of which this changes four things.

    Inputs: microbatches are given as they are, where PyTorch would chop one large batch. Buffers: received tensors
    live from their receive to their backward; PyTorch keeps two for each microbatch of a step for ever. Gradients:
    FSDP reduces them in the last backward, overlapping it, or in each, where PyTorch always does so after the last.
    Last stage: its backward is never split in two, since a loss may make both gradients in one autograd function
    (`chunked_cross_entropy` does, in place), which would run twice.
    """

    def __init__(
        self,
        stage: Stage,
        index: int,
        num_stages: int,
        device: torch.device,
        group: ProcessGroup,
        travelling: Tensor,
        reduction: Reduction | None,
    ) -> None:
        """`travelling`: on the meta device. `reduction`: None leaves it to PyTorch, which a split backward needs."""
        loss = torch.empty(1, device="meta", requires_grad=True)
        outputs = loss if index == num_stages - 1 else travelling
        inputs = travelling if index else ()
        super().__init__(stage, index, num_stages, device, input_args=inputs, output_args=outputs, group=group)
        self.microbatches: Sequence[Microbatch] = ()
        self.autocast: Autocast = nullcontext
        self._travelling, self._reduction = travelling, reduction
        self._nothing = torch.empty(0, device=device)
        self._has_preallocated = True

    def forward_one_chunk(  # type: ignore[override]  # the options differ between releases
        self, fwd_chunk_id: int, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        self._drop_preallocated()
        given = {"microbatch": self.microbatches[fwd_chunk_id]}
        with self.autocast():
            output = super().forward_one_chunk(fwd_chunk_id, args, given, **options)
        if not self.is_last:
            _check_output(output, tuple(self._travelling.shape), self._travelling.dtype, self.stage_index)
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(
            bwd_chunk_id, loss=loss, full_backward=full_backward or self.is_last, last_backward=last_backward
        )
        for info in (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info[bwd_chunk_id]):
            info.buffer = self._nothing

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if not self.is_last:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], Any]:
        module, reduction = self.submod, self._reduction
        if not isinstance(module, FSDPModule) or reduction is None:
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward=last_backward)
        module.set_requires_gradient_sync(last_backward or reduction.each_microbatch)
        module.set_requires_all_reduce(last_backward)
        module.set_reshard_after_backward(last_backward or reduction.reshard)
        torch.autograd.backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"])
        tensors = [value for value in bwd_kwargs["input_values"] if isinstance(value, Tensor)]
        grads = tuple(tensor.grad for tensor in tensors)
        for tensor in tensors:
            tensor.grad = None
        return grads, None

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._drop_preallocated()
        self._make_room(self.args_recv_info[fwd_chunk_id], requires_grad=self.has_backward)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._make_room(self.grad_recv_info[bwd_chunk_id], requires_grad=False)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        self._drop_preallocated()
        super().set_local_fwd_input(prev_stage_outputs, mb_index)

    def _make_room(self, infos: Sequence[Any], requires_grad: bool) -> None:
        for info in infos:
            info.buffer = torch.empty_like(self._travelling, device=self.device, requires_grad=requires_grad)

    def _drop_preallocated(self) -> None:
        """Let go of the buffers that PyTorch made for all microbatches when it prepared this stage."""
        if self._has_preallocated:
            for infos in (*self.args_recv_info.values(), *self.grad_recv_info.values()):
                for info in infos:
                    info.buffer = self._nothing
            self._has_preallocated = False
