"""What one rank computes in one training step, as kernels: matrix products by size, attention, bytes read and written.

Made of the settings alone; how long it takes, and what is exchanged meanwhile, is for others (times.py, step_time.py).
A multiply and an add are two operations. No torch here: plain numbers in, plain numbers out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from ternlm.config.layout import Layout
from ternlm.config.run import Config
from ternlm.config.stages import OwnStage, own_stages
from ternlm.config.training import recomputed_blocks
from ternlm.planner.adapter_work import AdapterWork
from ternlm.planner.frozen import ALL_PASSED, Passed, adapted_matrices, passed_at_entry
from ternlm.planner.kernels import Kernels, Matmul

LARGEST_IN_HEAP = 2**25
"""Bytes of the largest allocation that glibc may take from its heap (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits)."""


@dataclass(frozen=True)
class Program:
    """What a step does beside what the settings say. The defaults are TernLM's; published runs are of others."""

    float8: bool = False
    """Whether the blocks' matrix products are in float8."""
    float8_messages: bool = False
    """Whether what is gathered, weights and activations, is in float8 too."""
    fused: bool = True
    """Whether what lies between the matrix products is compiled into few kernels."""
    attention: Literal["flash1", "flash2", "biased"] = "flash2"
    """Generation of the kernels; biased: a bias for each distance is added to the scores (ALiBi)."""
    gated_mlp: bool = True
    """False: an MLP of two matrices, of as many weights as the settings' three."""
    halved_recompute: bool = False
    """Whether a recomputed block keeps every second product's result (torchtitan's "selective")."""
    whole_recompute: bool = False
    """Whether a recomputed block runs again to its end, though its last product's result isn't needed."""
    whole_logits: bool = False
    """Whether all logits of a microbatch exist at once, of `logit_bytes` each with what the loss makes of them."""
    logit_bytes: float = 10.0
    weight_bytes: float = 4.0
    """Per parameter, where it isn't cut; likewise what the optimizer adds."""
    state_bytes: float = 8.0
    even_stages: bool = False
    """Whether stages have equally many layers, those left over last, though the last stage has the head as well."""
    hidden_tensor: bool = False
    """Whether what tensor parallelism exchanges is overlapped with the products."""
    broadcasts: bool = False
    """Whether updated weights are sent tensor by tensor from their owners (InternLM's framework), not gathered."""


@dataclass(frozen=True)
class Stage:
    """What one rank of a pipeline has, or the only one; per microbatch."""

    blocks: int
    recomputed: int
    """How many of the blocks run forward again in backward."""
    ends_forward: Kernels
    """Embedding, final norm and head with the loss, as far as they are here; likewise backward."""
    ends_backward: Kernels
    entries: int = 0
    """How many of the blocks have an input without a gradient: the first, behind a frozen embedding."""


@dataclass(frozen=True)
class Work:
    """One step's computation."""

    microbatches: int
    microbatch_tokens: int
    """Of one rank."""
    element_bytes: int
    """Of a number in the products' format."""
    document_tokens: int
    forward: Kernels
    """Of one block and microbatch; likewise the next two."""
    backward: Kernels
    again: Kernels
    """What a recomputed block does once more."""
    entry_backward: Kernels
    """Backward of a block whose input has no gradient."""
    stages: tuple[Stage, ...]
    """By rank of the pipeline."""
    update_bytes: tuple[float, ...]
    """What the optimizer reads and writes, by rank of the pipeline."""
    accumulate_bytes: tuple[float, ...]
    """What adding up gradients reads and writes, for each microbatch, by rank of the pipeline."""
    fresh_bytes: tuple[float, ...]
    """Memory that a CPU's allocator maps anew, for each microbatch, by rank of the pipeline."""

    def forward_of(self, stage: Stage) -> list[tuple[int, Kernels]]:
        """Return a microbatch's kernels forward on a rank, and how often each run."""
        return [(stage.blocks, self.forward), (1, stage.ends_forward)]

    def backward_of(self, stage: Stage) -> list[tuple[int, Kernels]]:
        """Return the same backward, with what is recomputed."""
        blocks = [(stage.blocks - stage.entries, self.backward), (stage.entries, self.entry_backward)]
        return [*blocks, (stage.recomputed, self.again), (1, stage.ends_backward)]


def step_work(
    config: Config, layout: Layout, program: Program | None = None, document_tokens: int | None = None
) -> Work:
    """Return what a rank computes in a step of full batch size.

    document_tokens: length of the documents that attention may not cross; a whole sequence if not given.
    """
    program = program or Program(fused=config.compute.compile != "off")
    batch, sizes = config.batch, _Sizes(config, layout, program, document_tokens or config.data.seq_len)
    stages = [program_stages(config, layout.pipeline, rank, program) for rank in range(layout.pipeline)]
    parameters = [trained_parameters(config, layout, own) for own in stages]
    accumulating = batch.global_sequences // (batch.microbatch_sequences * layout.data) > 1
    return Work(
        microbatches=batch.global_sequences // (batch.microbatch_sequences * layout.data),
        microbatch_tokens=sizes.tokens,
        element_bytes=sizes.element,
        document_tokens=sizes.document,
        forward=sizes.forward(),
        backward=sizes.backward(),
        again=sizes.again(),
        entry_backward=sizes.backward(passed_at_entry(config.adapter) if config.adapter else ALL_PASSED),
        stages=tuple(sizes.stage(own) for own in stages),
        update_bytes=tuple(update_bytes(own, layout, sizes.element) for own in parameters),
        accumulate_bytes=tuple(accumulate_bytes(own, layout, sizes.element) * accumulating for own in parameters),
        fresh_bytes=tuple(sizes.fresh_bytes(own) for own in stages),
    )


def program_stages(config: Config, ranks: int, rank: int, program: Program) -> list[OwnStage]:
    """Return the stages that `rank` of a pipeline of `ranks` has in a program."""
    own = own_stages(config, ranks, rank)
    if not program.even_stages:
        return own
    count, layers = ranks * config.parallel.stages_per_rank, config.model.num_hidden_layers
    start = [stage * (layers // count) + max(stage - count + layers % count, 0) for stage in range(count + 1)]
    return [stage._replace(layers=range(start[stage.number], start[stage.number + 1])) for stage in own]


def update_bytes(parameters: float, layout: Layout, element: int = 2) -> float:
    """Return what the optimizer reads and writes of so many parameters, cuts aside.

    AdamW reads weight, gradient and two moments and writes three; the norm reads, clipping reads and writes the
    gradient: 40 bytes. In between lies a copy in the format of the products, of `element` bytes, unless that is the
    weights' own.
    """
    return parameters * (40.0 / layout.optimizer + (4.0 + element) * (element < 4) / layout.shard)


def accumulate_bytes(parameters: float, layout: Layout, element: int = 2) -> float:
    """Return what adding a microbatch's gradients to the sum reads and writes."""
    return parameters * (8.0 + element) / layout.grads


def element_bytes(config: Config) -> int:
    """Return the bytes of a number in the products' format; `auto` is taken for bfloat16."""
    return 4 if config.compute.dtype == "float32" else 2


def kept_bytes(config: Config) -> int:
    """Return the bytes of a weight of the embedding, the norms and the head, and of a frozen matrix not in 4 bits."""
    if config.adapter is None:
        return 4
    base = config.adapter.base
    return element_bytes(config) if base in ("auto", "nf4") else 4 if base == "float32" else 2


class _Sizes:
    """Sizes of one rank's tensors."""

    def __init__(self, config: Config, layout: Layout, program: Program, document: int) -> None:
        model, self.program, self.config = config.model, program, config
        self.tokens = config.batch.microbatch_sequences * config.data.seq_len // layout.context
        self.document = min(document, config.data.seq_len)
        self.hidden = model.hidden_size
        self.queries = model.num_attention_heads * model.head_size // layout.tensor
        self.keys = model.kv_heads * model.head_size // layout.tensor
        self.inner = model.intermediate_size // layout.tensor
        if not program.gated_mlp:
            self.inner = self.inner * 3 // 2
        self.vocab = model.vocab_size // layout.tensor
        self.tied = model.tie_word_embeddings
        # Norms and residuals are cut along the sequence.
        self.stream = self.hidden // layout.tensor if config.parallel.sequence else self.hidden
        self.element = element_bytes(config)
        self.adapters: AdapterWork | None = None
        if config.adapter:
            self.adapters = AdapterWork(config.model, config.adapter, layout.tensor, self.tokens, self.element)

    def products(self) -> list[tuple[int, int]]:
        """Return in and out of a block's matrices, those with the same input as one."""
        up = 2 if self.program.gated_mlp else 1
        return [
            (self.hidden, self.queries + 2 * self.keys),
            (self.queries, self.hidden),
            (self.hidden, up * self.inner),
            (self.inner, self.hidden),
        ]

    def attention_flops(self) -> float:
        """Of a block's causal attention forward: half of 4 x heads x head size for each pair."""
        return 2.0 * self.queries * self.tokens * self.document

    def forward(self) -> Kernels:
        """Return a block's forward pass."""
        matmuls = tuple(Matmul(self.tokens, out, into, self.program.float8) for into, out in self.products())
        launches = 14 if self.program.fused else 28
        moved = self.tokens * self.element * self._elements()[0]
        forward = Kernels(matmuls, self.attention_flops(), 0.0, moved, 0.0, launches)
        return self.adapters.with_forward(forward, self.program.fused) if self.adapters else forward

    def backward(self, passed: Passed = ALL_PASSED) -> Kernels:
        """Return a block's backward pass: gradients of inputs and of weights. passed: what of it takes part."""
        attention = 2.5 * self.attention_flops() * passed.attention
        launches = 26 if self.program.fused else 56
        moved = self.tokens * self.element * self._elements()[1]
        if self.adapters:
            matmuls = self.adapters.input_gradients(passed)
            return self.adapters.with_backward(
                Kernels(matmuls, 0.0, attention, moved, 0.0, launches), passed, self.program.fused
            )
        both: list[Matmul] = []
        for into, out in self.products():
            both += [
                Matmul(self.tokens, into, out, self.program.float8),
                Matmul(out, into, self.tokens, self.program.float8),
            ]
        return Kernels(tuple(both), 0.0, attention, moved, 0.0, launches)

    def again(self) -> Kernels:
        """Return what a recomputed block does once more in its backward pass."""
        forward = self.forward()
        if self.config.compute.recompute_keep == "matmuls":
            return Kernels((), 0.0, 0.0, forward.stream_bytes, 0.0, forward.launches // 2)
        if self.program.halved_recompute:
            # Of q, k, v, o, gate, up and down every second one isn't kept: k, o and up.
            outs = ((self.hidden, self.keys), (self.queries, self.hidden), (self.hidden, self.inner))
            matmuls = tuple(Matmul(self.tokens, out, into, self.program.float8) for into, out in outs)
            return Kernels(matmuls, 0.0, 0.0, forward.stream_bytes, 0.0, forward.launches)
        if self.program.whole_recompute or (self.adapters and self.adapters.needs_last_result):
            return forward
        return replace(forward, matmuls=forward.matmuls[:-1])

    def _elements(self) -> tuple[float, float]:
        """Elements per token that norms, residuals, rotation and activation read and write: forward, backward."""
        rotated = 2 * (self.queries + self.keys)
        if self.program.fused:  # residual and norm in one kernel
            forward, backward, inner = 8 * self.stream, 8 * self.stream, (3, 5)
        else:
            forward, backward, inner = 10 * self.stream, 12 * self.stream, (5, 9)
        if not self.program.gated_mlp:
            inner, rotated = (2, 3), 0
        return forward + inner[0] * self.inner + rotated, backward + inner[1] * self.inner + rotated

    def stage(self, own: Iterable[OwnStage]) -> Stage:
        """Return what a rank has of blocks and ends."""
        own = list(own)
        blocks = sum(len(stage.layers) for stage in own)
        first, last = any(stage.first for stage in own), any(stage.last for stage in own)
        table = float(self.vocab * self.hidden)
        embedding = 3 * self.element * self.tokens * self.stream * first
        head, logits = (self.hidden, self.vocab), float(self.tokens) * self.vocab * last
        into, out = head
        forward = (Matmul(self.tokens, out, into),) if last else ()
        backward: tuple[Matmul, ...] = (Matmul(self.tokens, into, out),) if last else ()
        if not self.adapters:  # the head's gradient is made, and the embedding's
            backward += (Matmul(out, into, self.tokens),) if last else ()
        # The loss in float32: the logits are written, cast, exponentiated, summed; backward, made a gradient and cast.
        forward_bytes, backward_bytes = (10.0, 8.0) if self.program.fused else (14.0, 12.0)
        tables = cleared = 0.0
        if self.element == 4:
            # TernLM's own: greatest, difference, exponential, sum; scaled to a gradient. Nothing is cast.
            forward_bytes, backward_bytes = 24.0, 8.0
            # The head's gradient is cleared, scaled by the sum's; the embedding's is cleared, or added to it if tied.
            tables, cleared = 12.0 * table * last, table * (4.0 * first + 12.0 * (self.tied and first and last))
        embedding_back = 2 * embedding + cleared
        if self.adapters:
            tables = embedding_back = 0.0
        return Stage(
            blocks,
            recomputed_blocks(blocks, self.config.compute.recompute),
            Kernels(forward, 0.0, 0.0, embedding, forward_bytes * logits, 6 * last + 2 * first),
            Kernels(backward, 0.0, 0.0, embedding_back, backward_bytes * logits + tables, 8 * last + 2 * first),
            entries=int(first and self.adapters is not None),
        )

    def fresh_bytes(self, own: Iterable[OwnStage]) -> float:
        """Return the bytes of a microbatch's tensors so large that glibc maps each anew: those of over 32 MiB.

        Smaller ones come from its heap, whose memory stays with the process.
        """

        def mapped(*shape: int, bytes: int = 4) -> float:
            whole = float(bytes * math.prod(shape))
            return whole if whole > LARGEST_IN_HEAP else 0.0

        own, inner = list(own), mapped(self.tokens, self.inner, bytes=self.element)
        stream = mapped(self.tokens, self.stream, bytes=self.element)
        # Kept and passed on, forward; their gradients, backward.
        block = 6 * inner + 12 * stream + sum(mapped(*product) for product in self.products())
        chunk = min(self.config.loss.chunk_tokens or cpu_chunk_tokens(self.config.model.vocab_size), self.tokens)
        logits = mapped(chunk, self.vocab) * self.tokens / chunk
        table = mapped(self.vocab, self.hidden)
        first, last = any(stage.first for stage in own), any(stage.last for stage in own)
        tables = first + last + (self.tied and first and last)  # a tied one's two gradients make a third
        tables *= self.adapters is None
        return sum(len(stage.layers) for stage in own) * block + tables * table + last * logits


def cpu_chunk_tokens(vocab_size: int) -> int:
    """Return how many tokens' logits exist at a time on a CPU, where the settings leave it open."""
    return max(2**27 // (4 * vocab_size), 64)


def stage_parameters(config: Config, layout: Layout, own: Iterable[OwnStage]) -> float:
    """Return how many parameters a rank of this place has, all cuts over data ranks aside."""
    model, count = config.model, 0
    for stage in own:
        count += len(stage.layers) * model.num_layer_params
        table = model.vocab_size * model.hidden_size
        count += table * (stage.first + (stage.last and not (stage.first and model.tie_word_embeddings)))
    return count / layout.tensor


def held_parameters(config: Config, layout: Layout, own: Iterable[OwnStage]) -> float:
    """Return the same with adapters, and without the matrices in 4 bits, which aren't cut over data ranks."""
    own = list(own)
    if config.adapter is None:
        return stage_parameters(config, layout, own)
    layers = sum(len(stage.layers) for stage in own)
    whole = stage_parameters(config, layout, own) - layers * packed_weights(config, layout)
    return whole + trained_parameters(config, layout, own)


def packed_weights(config: Config, layout: Layout) -> int:
    """Return how many weights of a block are in 4 bits on a tensor rank."""
    if config.adapter is None or config.adapter.base != "nf4":
        return 0
    return sum(one.outputs * one.inputs for one in adapted_matrices(config.model, config.adapter, layout.tensor))


def trained_parameters(config: Config, layout: Layout, own: Iterable[OwnStage]) -> float:
    """Return how many parameters a rank of this place trains, all cuts over data ranks aside."""
    if config.adapter is None:
        return stage_parameters(config, layout, own)
    layers = sum(len(stage.layers) for stage in own)
    matrices = adapted_matrices(config.model, config.adapter, layout.tensor)
    return float(layers * sum(config.adapter.num_params_of((one.outputs, one.inputs)) for one in matrices))
