"""Stages of a pipeline as modules. Which layers make one, and which rank has it, is in `config/stages.py`.

A stage is cut out of a whole model on the meta device; nothing is allocated for what other ranks hold. How stages
are run is in `pipeline.py`. The model is taken by the names of its parts, those of Hugging Face's Llama.

Shapes: B batch, T tokens, D hidden.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ternlm.config.section import ConfigError
from ternlm.ops.attention import Attend

StageLoss = Callable[[nn.Module, Tensor], tuple[Tensor, Any]]
"""`(head, hidden_BTD) -> (what goes backward, what the pipeline returns)`; the second holds no graph."""


class Microbatch:
    """What the stages of a rank are told of one microbatch; its tensors are on the stages' device.

    A plain class on purpose: FSDP looks into tuples and dataclasses, and would cast the floats that it finds.
    """

    def __init__(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attend: Attend,
        loss: StageLoss,
        rope_length: int | Tensor | None = None,
    ) -> None:
        """`rope_length`: as for the model; with dynamic scaling and sequences cut over ranks it must be given."""
        self.tokens_BT = tokens_BT
        self.positions_BT = positions_BT
        self.attend = attend
        self.loss = loss
        self.rope_length = rope_length
        self.kept: Any = None
        """What `loss` gave to be returned, once the last stage has run."""


class Blocks(nn.Module):
    """Some of a model's blocks, each under the number that it has in the model; iterates over them in order."""

    def __init__(self, blocks: Mapping[int, nn.Module]) -> None:
        super().__init__()
        for number, block in blocks.items():
            self.add_module(str(number), block)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._modules)


class Stage(nn.Module):
    """Consecutive blocks of a model; the first stage has the embedding too, the last the final norm and the head.

    The names of parameters are those of the whole model: `model.layers.7.self_attn.q_proj.weight` on every stage.
    """

    def __init__(self, model: nn.Module, layers: range, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last = first, last
        whole: Any = model
        own = nn.Module()
        if first:
            own.embed_tokens = whole.model.embed_tokens
        own.layers = Blocks({number: whole.model.layers[number] for number in layers})
        if last:
            own.norm = whole.model.norm
            self.lm_head = whole.lm_head
        self.model: Any = own
        # The whole model's own functions, so that a stage computes what the model does.
        self._embed: Callable[[Tensor], Tensor] = whole.embed
        self._rotations: Callable[[Tensor, torch.dtype, int | Tensor | None], tuple[Tensor, Tensor]] = whole.rotations

    def forward(self, x_BTD: Tensor | None = None, *, microbatch: Microbatch) -> Tensor:
        """Return the blocks' output; on the last stage the loss, (1,).

        x_BTD: the previous stage's output; None on the first.
        """
        if x_BTD is None:
            x_BTD = self._embed(microbatch.tokens_BT)
        cos, sin = self._rotations(microbatch.positions_BT, x_BTD.dtype, microbatch.rope_length)
        for block in self.model.layers:
            x_BTD = block(x_BTD, cos, sin, microbatch.attend)
        if not self.last:
            return x_BTD
        total, microbatch.kept = microbatch.loss(self.lm_head, self.model.norm(x_BTD))
        return torch.stack([total])  # not a view: the schedule detaches it in place


def cut_stage(model: nn.Module, layers: range, first: bool, last: bool) -> Stage:
    """Cut one stage out of a whole model on the meta device; the stage shares its modules with the model.

    Raises ConfigError where embedding and head are one weight and would part.
    """
    whole: Any = model
    if first != last and whole.lm_head.weight is whole.model.embed_tokens.weight:
        raise ConfigError(
            "model.tie_word_embeddings = true needs embedding and head in one stage; set parallel.pipeline=1 or untie"
        )
    return Stage(model, layers, first, last)


def join_stages(stages: Iterable[Stage]) -> nn.Module:
    """Return this rank's part of the model as one module, to be initialised, cut, optimised, saved and loaded by.

    It shares its modules with the stages, under the names of the whole model; it can't be called.
    """
    joined: Any = nn.Module()
    joined.model = nn.Module()
    blocks: dict[int, nn.Module] = {}
    for stage in stages:
        blocks |= {int(name): block for name, block in stage.model.layers.named_children()}
        if stage.first:
            joined.model.embed_tokens = stage.model.embed_tokens
        if stage.last:
            joined.model.norm = stage.model.norm
            joined.lm_head = stage.lm_head
    joined.model.layers = Blocks(blocks)
    return joined
