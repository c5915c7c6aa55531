"""Tensor and sequence parallelism: which parameters are cut how, and what the modules do about it.

The plan goes by parameter names; the model file doesn't know. A cut parameter is a plain tensor of this rank's part,
so that everything later (recompute, compile, FSDP, the optimizer) sees an ordinary, smaller model.

Shapes: B batch, T tokens, D hidden, V vocabulary; t is the degree.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ternlm.ops.loss import VocabShard
from ternlm.parallel.collectives import copy_to_ranks, gather_sequence, scatter_sequence, sum_over_ranks
from ternlm.parallel.spans import exchange

PLAN: dict[str, int | None] = {
    "model.embed_tokens.weight": 0,
    "model.layers.*.self_attn.[qkv]_proj.weight": 0,
    "model.layers.*.self_attn.[qkv]_proj.bias": 0,
    "model.layers.*.self_attn.o_proj.weight": 1,
    "model.layers.*.self_attn.o_proj.bias": None,
    "model.layers.*.self_attn.[qk]_norm.weight": None,
    "model.layers.*.mlp.gate_proj.weight": 0,
    "model.layers.*.mlp.up_proj.weight": 0,
    "model.layers.*.mlp.down_proj.weight": 1,
    # Adapters: of matrices cut by outputs B is cut and A whole, of those cut by inputs the other way round.
    "model.layers.*.[qkvgu]*_proj.lora_A.weight": None,
    "model.layers.*.[qkvgu]*_proj.lora_B.weight": 0,
    "model.layers.*.[qkvgu]*_proj.magnitude": 0,
    "model.layers.*.[od]*_proj.lora_A.weight": 1,
    "model.layers.*.[od]*_proj.lora_B.weight": None,
    "model.layers.*.[od]*_proj.magnitude": None,
    "model.layers.*.*_layernorm.weight": None,
    "model.norm.weight": None,
    "lm_head.weight": 0,
}
"""The dimension along which each parameter is cut over tensor ranks, by pattern of its name; None: whole on each."""


def cut_dimension(name: str) -> int | None:
    """Return the dimension along which a parameter is cut; raises KeyError where the plan doesn't name it once."""
    found = [dim for pattern, dim in PLAN.items() if fnmatchcase(name, pattern)]
    if len(found) != 1:
        raise KeyError(f"{len(found)} patterns of the tensor plan match {name}; exactly one must: see PLAN")
    return found[0]


def has_partial_gradient(name: str, sequence: bool) -> bool:
    """Whether a whole parameter's gradient is to be summed over tensor ranks, since each saw a part of the data.

    sequence: whether the residual stream is cut along the sequence. Norms of queries and keys see a part of the heads,
    what is whole of an adapter a part of its matrix.
    """
    if cut_dimension(name) is not None:
        return False
    return sequence or name.endswith(("q_norm.weight", "k_norm.weight", "_proj.magnitude")) or ".lora_" in name


def cut_tensors(model: Any, group: ProcessGroup, sequence: bool) -> None:
    """Cut the model's parameters, in place, and let its modules exchange what they then lack.

    model: a causal language model on the meta device, or holding the same values on every rank.
    sequence: whether what lies between the matrices (norms, residual stream) is cut along the sequence too.
    """
    parts = dict(model.model.named_children())  # a stage of a pipeline has some of them
    embedding: Any = parts.get("embed_tokens")
    norm: Any = parts.get("norm")
    head: Any = dict(model.named_children()).get("lm_head")
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    for module_name, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            dim = cut_dimension(f"{module_name}.{name}" if module_name else name)
            if dim is not None:
                part = nn.Parameter(_own_part(parameter, dim, group), requires_grad=parameter.requires_grad)
                setattr(module, name, part)
    if tied:
        head.weight = embedding.weight
    enter = gather_sequence if sequence else copy_to_ranks
    leave = scatter_sequence if sequence else sum_over_ranks
    for block in parts["layers"]:
        for part, last in ((block.self_attn, block.self_attn.o_proj), (block.mlp, block.mlp.down_proj)):
            part.forward = _entered(part.forward, group, enter)
            last.forward = _row_linear(last, group, leave)
            last.sum_over_parts = partial(sum_over_ranks, group=group)  # of an adapter
    if embedding is not None:
        embedding.forward = _embedding(embedding, group, leave)
    if norm is not None:
        norm.forward = _left(norm.forward, group, enter)
    if head is not None:
        head.forward = _head(head, group)


def _own_part(parameter: nn.Parameter, dim: int, group: ProcessGroup) -> Tensor:
    return parameter.detach().chunk(group.size(), dim)[group.rank()].clone(memory_format=torch.contiguous_format)


def _entered(forward: Callable[..., Tensor], group: ProcessGroup, enter: Any) -> Callable[..., Tensor]:
    def entered(x_BTD: Tensor, *rest: Any) -> Tensor:
        return forward(enter(x_BTD, group), *rest)

    return entered


def _left(forward: Callable[[Tensor], Tensor], group: ProcessGroup, enter: Any) -> Callable[[Tensor], Tensor]:
    # After the final norm, so that the head sees whole sequences; its gradients are partial sums over the vocabulary.
    def left(x_BTD: Tensor) -> Tensor:
        return enter(forward(x_BTD), group)

    return left


def _row_linear(linear: Any, group: ProcessGroup, leave: Any) -> Callable[[Tensor], Tensor]:
    def row_linear(x_BTD: Tensor) -> Tensor:
        out_BTD = leave(linear.product(x_BTD), group)
        return out_BTD if linear.bias is None else out_BTD + linear.bias.to(out_BTD.dtype)  # once, not on each rank

    return row_linear


def _embedding(embedding: nn.Embedding, group: ProcessGroup, leave: Any) -> Callable[[Tensor], Tensor]:
    def embed(tokens_BT: Tensor) -> Tensor:
        rows = embedding.weight.shape[0]
        own_BT = tokens_BT - group.rank() * rows
        elsewhere_BT = (own_BT < 0) | (own_BT >= rows)
        found_BTD = F.embedding(own_BT.masked_fill(elsewhere_BT, 0), embedding.weight)
        return leave(found_BTD.masked_fill(elsewhere_BT[..., None], 0), group)

    return embed


def _head(head: nn.Linear, group: ProcessGroup) -> Callable[..., Any]:
    def reduce(values: Tensor, op: Any) -> Tensor:
        values = values.contiguous()
        with exchange("all_reduce", "tensor"):
            dist.all_reduce(values, op, group)
        return values

    def head_forward(hidden_BTD: Tensor, consume: Callable[..., Any] | None = None) -> Any:
        first = group.rank() * head.weight.shape[0]
        if consume is None:
            raise NotImplementedError("logits of a head that is cut over ranks; load the checkpoint on one rank")
        shard = VocabShard(
            first,
            group.size() * head.weight.shape[0],
            lambda values: reduce(values, dist.ReduceOp.MAX),
            lambda values: reduce(values, dist.ReduceOp.SUM),
        )
        return consume(hidden_BTD, head.weight, vocab=shard)

    return head_forward
