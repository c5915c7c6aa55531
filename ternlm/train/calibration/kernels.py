"""The pieces of work that calibration times: what a training step is made of, each by itself, at several sizes.

They run the project's own code: its attention, its block as it is compiled here, its loss, its optimizer. How long they
take is for the clock (clock.py), what that says of the device for the fit (fit.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.config.training import ComputeConfig, OptimizerConfig
from ternlm.model.decoder import Block
from ternlm.model.rope import rope_tables
from ternlm.ops.attention import Attend, make_segment_attend
from ternlm.ops.loss import chunked_cross_entropy
from ternlm.optim.clip import gradient_norm, scale_gradients
from ternlm.optim.groups import build_optimizers
from ternlm.parallel.apply import prepare_blocks
from ternlm.parallel.mesh import one_rank
from ternlm.parallel.pieces import make_pieces
from ternlm.planner.kernels import Matmul
from ternlm.train.objective import chunk_tokens
from ternlm.train.precision import autocast

Work = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """How large what is timed is: enough to fill the device, small enough for a minute."""

    tokens: tuple[int, ...]
    widths: tuple[int, ...]
    documents: tuple[int, ...]
    attention_tokens: int
    heads: tuple[tuple[int, int], ...]
    """Number and size."""
    block: tuple[int, int]
    """Tokens and width of the block whose other kernels are looked at."""
    vocabulary: int
    parameters: int
    stream_bytes: int


def sizes_for(device: torch.device) -> Sizes:
    """Return the sizes for a CPU of some cores, or for a GPU."""
    if device.type == "cpu":
        return Sizes(
            tokens=(128, 512, 2048),
            widths=(256, 512, 1024),
            documents=(64, 128, 256, 512, 1024, 2048, 4096),
            attention_tokens=4096,
            heads=((8, 64), (4, 128)),
            block=(1024, 256),
            vocabulary=16_000,
            parameters=2**23,
            stream_bytes=2**28,
        )
    return Sizes(
        tokens=(1024, 4096, 16384),
        widths=(1024, 4096, 8192),
        documents=(256, 1024, 4096, 16384),
        attention_tokens=16384,
        heads=((16, 128), (16, 64)),
        block=(8192, 2048),
        vocabulary=32_000,
        parameters=2**27,
        stream_bytes=2**31,
    )


def matmul_works(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Matmul, Work]]:
    """Return products as training has them: forward, gradient of the input, gradient of the weight."""
    works: dict[str, tuple[Matmul, Work]] = {}
    for tokens in sizes.tokens:
        for width in sizes.widths:
            for into, out in ((width, width), (width, 11 * width // 4)):
                x, g, w = (_random(shape, device, dtype) for shape in ((tokens, into), (tokens, out), (out, into)))
                name = f"{tokens} x {into} x {out}"
                works[f"{name} forward"] = Matmul(tokens, out, into), partial(_product, x, w.T)
                works[f"{name} input"] = Matmul(tokens, into, out), partial(_product, g, w)
                works[f"{name} weight"] = Matmul(out, into, tokens), partial(_product, g.T, x)
    return works


@dataclass(frozen=True)
class AttentionWork:
    """Attention over packed documents."""

    flops: float
    """Of causal attention forward, with the masked half left out."""
    document: float
    """Length that the planner takes for these documents (tokens): the mean over tokens, not over documents."""
    forward: Work
    backward: Work


def attention_works(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, AttentionWork]:
    """Return the project's attention over documents of several lengths; neighbours differ, as in real data."""
    works = {}
    for heads, size in sizes.heads:
        for document in sizes.documents:
            lengths = _uneven(sizes.attention_tokens, document)
            tokens = sum(lengths)
            attend = make_segment_attend([lengths], device)
            q, k, v = (_random((1, tokens, heads, size), device, dtype).requires_grad_() for _ in range(3))
            out = attend(q, k, v, 0)
            grad = torch.randn_like(out)
            squares = sum(n * n for n in lengths)
            works[f"{heads} x {size} heads, documents of {document}"] = AttentionWork(
                2.0 * heads * size * squares,
                squares / tokens,
                partial(attend, q.detach(), k.detach(), v.detach(), 0),
                partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True),
            )
    return works


@dataclass
class BlockWork:
    """One block of the model, as training runs it, and those parts of it that have rates of their own."""

    config: ModelConfig
    tokens: int
    compiled: bool
    works: dict[str, Work] = field(default_factory=dict)
    """Forward, backward; the products and the attention of each."""


def block_work(
    tokens: int, width: int, compute: ComputeConfig, compiled: bool, device: torch.device, dtype: torch.dtype
) -> BlockWork:
    """Return a block over one document of so many tokens. The first call compiles it, if it is to be."""
    heads = max(width // (64 if device.type == "cpu" else 128), 1)
    config = ModelConfig(
        vocab_size=8,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=11 * width // 4,
        max_position_embeddings=tokens,
    )
    with torch.device(device):
        block: Any = Block(config, 0)
    prepare_blocks([block], compute, compiled)
    x = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    cos, sin = rope_tables(config, torch.arange(tokens, device=device)[None], tokens, dtype)
    attend = make_segment_attend([[tokens]], device)
    grad = torch.randn(1, tokens, width, device=device, dtype=dtype)
    parameters = [x, *block.parameters()]
    made = BlockWork(config, tokens, compiled)

    def forward() -> Tensor:
        with autocast(device, dtype):
            return block(x, cos, sin, attend)

    # A backward pass needs a forward one, of which it frees what was kept: timed together, told apart by the fit.
    made.works["both"] = lambda: torch.autograd.grad(forward(), parameters, grad)
    made.works |= _parts(config, tokens, attend, device, dtype)
    return made


def _parts(
    config: ModelConfig, tokens: int, attend: Attend, device: torch.device, dtype: torch.dtype
) -> dict[str, Work]:
    """Return a block's products and attention by themselves."""
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    pairs = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    operands = [
        tuple(_random(shape, device, dtype) for shape in ((tokens, into), (tokens, out), (out, into)))
        for into, out in pairs
    ]
    q, k, v = (_random((1, tokens, heads, config.head_size), device, dtype).requires_grad_() for _ in range(3))
    grad = _random((1, tokens, heads, config.head_size), device, dtype)

    def products() -> None:
        for x, g, w in operands:
            _product(x, w.T), _product(g, w), _product(g.T, x)

    return {"products": products, "attention": lambda: torch.autograd.grad(attend(q, k, v, 0), (q, k, v), grad)}


def loss_works(sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Work]:
    """Return head and loss with its gradients, whole and its products alone."""
    width, vocabulary = 2 * sizes.block[1], sizes.vocabulary
    hidden = _random((tokens, width), device, dtype).requires_grad_()
    weight = _random((vocabulary, width), device, torch.float32).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    chunk = chunk_tokens(vocabulary, device)
    head, rows = weight.detach().to(dtype), min(chunk, tokens)
    logits, inputs = _random((rows, vocabulary), device, dtype), hidden[:rows].detach()
    grad_weight = torch.zeros(vocabulary, width, device=device, dtype=torch.float32)

    def whole() -> object:
        losses = chunked_cross_entropy(hidden, weight, targets, torch.ones(tokens, device=device), chunk_tokens=chunk)
        return torch.autograd.grad(losses.total, (hidden, weight))

    def products() -> None:
        for _ in range(-(-tokens // chunk)):
            _product(inputs, head.T), _product(logits, head)
            if dtype == torch.float32:
                grad_weight.addmm_(logits.T, inputs)
            else:
                _product(logits.T, inputs)

    return {"whole": whole, "products": products}


def update_work(sizes: Sizes, device: torch.device) -> Work:
    """Return a step's norm, clipping and AdamW over `sizes.parameters` float32 weights."""
    mesh, model = one_rank(device), torch.nn.Module()
    rows = 16
    for index in range(rows):
        values = torch.randn(sizes.parameters // rows // 512, 512, device=device)
        model.register_parameter(f"p{index}", torch.nn.Parameter(values))
    pieces = make_pieces(model, mesh)
    optimizers = build_optimizers(pieces, OptimizerConfig(), mesh)
    for piece in pieces:
        piece.tensor.grad = torch.randn_like(piece.tensor)

    def update() -> None:
        scale_gradients(pieces, gradient_norm(pieces, mesh), 1.0, 1.0)
        for optimizer in optimizers:
            optimizer.step()

    return update


def stream_works(sizes: Sizes, device: torch.device) -> Mapping[str, Work]:
    """Return a copy between two tensors of `sizes.stream_bytes`, and writing one: in place, and in new memory."""
    source = torch.ones(sizes.stream_bytes // 4, device=device)
    target = torch.zeros_like(source)
    return {
        "copy": lambda: target.copy_(source),
        "write": lambda: target.fill_(1.0),
        "write anew": lambda: torch.empty_like(source).fill_(1.0),
    }


def _uneven(tokens: int, document: int) -> list[int]:
    """Return lengths of documents of about this length, of about so many tokens in all; no neighbours are alike."""
    number = max(tokens // document, 1)
    if number == 1:
        return [document]
    swing = max(document // 8, 1)
    return [document + (swing if index % 2 else -swing) for index in range(number)]


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return (0.02 * torch.randn(shape, device=device)).to(dtype)


@torch.no_grad()
def _product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right
