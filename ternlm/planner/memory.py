"""What one rank's memory holds when a training step needs most of it, by kind, from the settings alone.

The program it speaks of is TernLM's, uncompiled; a test holds it against `tern simulate`, which runs it. Looks at two
moments: the loss of the last microbatch, and the backward pass of the block after it. No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ternlm.config.layout import Layout
from ternlm.config.run import Config
from ternlm.config.stages import OwnStage
from ternlm.config.training import recomputed_blocks
from ternlm.planner.adapter_memory import AdapterMemory
from ternlm.planner.cluster import Cluster
from ternlm.planner.step_traffic import chunk_tokens
from ternlm.planner.work import Program, element_bytes, kept_bytes, packed_weights, program_stages

GIB = 2**30
KINDS = ("weights", "gathered", "gradients", "optimizer", "activations", "logits", "communication", "reserve")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak."""

    parts: dict[str, float]
    """By kind: weights, gathered (copies for the products), gradients, optimizer, activations, logits, communication
    (buffers), reserve (the driver's, the communication library's, and what lies between tensors)."""
    rank: int
    """Which rank of the pipeline."""
    parameters: float
    """That it has, cuts over data ranks aside; with adapters, not those in 4 bits."""
    trained: float
    """How many of them are trained."""
    packed: float
    """Weights in 4 bits beside them."""
    under_way: float
    """Microbatches that it has run forward and not yet backward, at most."""

    @property
    def bytes(self) -> float:
        """All of it."""
        return sum(self.parts.values())


def peak_memory(
    config: Config, layout: Layout, cluster: Cluster | None = None, program: Program | None = None
) -> Memory:
    """Return the memory of the rank that needs most. Without a cluster, nothing is held in reserve."""
    program = program or Program(fused=config.compute.compile != "off")
    ranks = range(layout.pipeline)
    found = [_RankMemory(config, layout, rank, program).peak() for rank in ranks]
    most = max(found, key=lambda memory: memory.bytes)
    if cluster:
        between = most.bytes * cluster.fragmentation
        most.parts["reserve"] = cluster.reserve_gib * GIB + between
    return most


class _RankMemory:
    """One pipeline rank's tensors, in bytes."""

    def __init__(self, config: Config, layout: Layout, rank: int, program: Program) -> None:
        self.config, self.layout, self.rank, self.program = config, layout, rank, program
        model = config.model
        self.stages: Sequence[OwnStage] = program_stages(config, layout.pipeline, rank, program)
        self.sequence = layout.tensor if config.parallel.sequence else 1
        self.element = element_bytes(config)
        self.tokens = config.batch.microbatch_sequences * config.data.seq_len // layout.context
        self.microbatches = config.batch.global_sequences // (config.batch.microbatch_sequences * layout.data)
        self.last = any(stage.last for stage in self.stages)
        self.first = any(stage.first for stage in self.stages)
        self.blocks = sum(len(stage.layers) for stage in self.stages)
        self.packed = packed_weights(config, layout)
        self.adapters = AdapterMemory(config, layout.tensor) if config.adapter else None
        adapters = self.adapters.num_params if self.adapters else 0
        self.layer = model.num_layer_params / layout.tensor - self.packed + adapters
        self.table = model.vocab_size * model.hidden_size / layout.tensor
        own_head = self.last and not (model.tie_word_embeddings and self.first)
        self.head = self.table if own_head else 0.0
        self.root = self.table * self.first + model.hidden_size * self.last
        self.parameters = self.blocks * self.layer + self.root + self.head
        self.trained_layer = adapters if config.adapter else self.layer
        self.trained = self.blocks * adapters if config.adapter else self.parameters
        # Where nothing is cut, weights are cast as they are used.
        self.gathers = layout.data_ranks > 1

    def peak(self) -> Memory:
        """Return the greater of two moments."""
        moments = [self._at_loss()] if self.last else []
        moments.append(self._in_backward())
        most = max(moments, key=lambda parts: sum(parts.values()))
        packed = float(self.blocks * self.packed)
        return Memory(most, self.rank, self.parameters, self.trained, packed, self._under_way())

    def _held(self) -> dict[str, float]:
        """What is there throughout; gradients as they are while the last microbatch runs."""
        layout, trained = self.layout, self.trained
        accumulated = 4 * trained / layout.grads if self.microbatches > 1 else 0.0
        weights = self.program.weight_bytes * self.parameters
        if self.config.adapter:
            weights = kept_bytes(self.config) * (self.parameters - trained) + 4 * trained
        packed = self.blocks * self.adapters.packed_bytes if self.adapters else 0.0  # whole on each data rank
        return {
            "weights": weights / layout.shard + packed,
            "gradients": accumulated,
            "optimizer": self.program.state_bytes * trained / layout.optimizer,
        }

    def _at_loss(self) -> dict[str, float]:
        parts = self._held()
        parts["gathered"] = self._gathered(self.head or (self.table if self.last else 0.0))
        mixed = self.element < 4
        # The stream that the head takes, its gradient and copies; FSDP casts the final norm's result once more.
        stream = self.tokens * self.config.model.hidden_size * self.element
        again = 1 if self.adapters else 3  # a frozen norm keeps less
        copies = again / self.sequence if self.gathers and not self.program.whole_logits else 0.0
        if not self.adapters:
            # The head's gradient in float32, and a chunk's part of it in the format of the products.
            parts["gradients"] += self.table * (4 + (self.element if self.gathers else 4) * mixed)
        parts["activations"] = self._activations() + stream * (4 + copies)
        vocab = self.config.model.vocab_size / self.layout.tensor
        rows = self.tokens if self.program.whole_logits else min(self.tokens, chunk_tokens(self.config))
        each = self.program.logit_bytes if self.program.whole_logits else 4 + self.element * mixed
        parts["logits"] = rows * vocab * each
        if self.layout.pipeline > 1:
            parts["communication"] = self._messages(at_loss=True)
        elif self.layout.reshard:
            parts["communication"] = self.head * self.element
        elif self.adapters and self.gathers and self.head * self.element > parts["gradients"]:
            # The first microbatch, which gathers what then stays, has no gradients yet.
            parts |= {"communication": self.head * self.element, "gradients": 0.0}
        return parts

    def _in_backward(self) -> dict[str, float]:
        parts = self._held()
        parts["gathered"] = self._gathered(self.layer)
        # A block's first gradients, in the format of the products.
        parts["gradients"] += self.trained_layer * self.element * 0.25
        if self.layout.pipeline > 1:  # what goes to the neighbours; gradients are reduced when less is under way
            parts["communication"] = self._messages(at_loss=False)
        elif self.layout.reshard:
            reduced = self.trained_layer if self.adapters else max(self.head, self.layer)
            parts["communication"] = 4 * reduced + self.element * self.layer
        elif self.layout.shard > 1 and not self.adapters:
            parts["communication"] = 4 * self.head
        again = recomputed_blocks(self.blocks, self.config.compute.recompute)
        block = self._block(0) - self._block(1) if again == self.blocks else 0.0
        transient = 3 * self.element * self.tokens * self.config.model.intermediate_size / self.layout.tensor
        if self.adapters:
            transient = max(transient, transient / 2 + self.adapters.passing_bytes)
            if self.adapters.dora and block:
                # While a block runs again: the last product's two parts and the stream, with the gradient and a sum.
                stream = self.element * self.tokens * self.config.model.hidden_size
                transient = max(transient, self.adapters.passing_bytes + 6 * stream)
        parts["activations"] = self._activations() + self.tokens * block + transient
        return parts

    def _gathered(self, beside_root: float) -> float:
        """Return the copies that products take; beside_root: parameters that are there for a moment."""
        if not self.gathers:
            return 0.0
        held = self.root + beside_root if self.layout.reshard else self.parameters
        return held * self.element

    def _activations(self) -> float:
        """Return what the backward passes to come will need, of all microbatches that are under way."""
        again = recomputed_blocks(self.blocks, self.config.compute.recompute)
        each = self.tokens * (again * self._block(1) + (self.blocks - again) * self._block(0))
        casts = 0.0
        if self.adapters:
            if self.first and not again:
                each -= self.tokens * self.adapters.entry_bytes(self.sequence, self.program.fused)
            if not self.gathers and self.element < 4:
                each += self.element * (self.blocks - again) * self.trained_layer
                casts = self.element * again * self.trained_layer
                if kept_bytes(self.config) > self.element:
                    frozen = self.layer - self.trained_layer
                    each += self.element * ((self.blocks - again) * frozen + self.table * self.last)
        elif not self.gathers and self.element < self.program.weight_bytes:
            # Weights that each microbatch casts for itself; those of recomputed blocks until it has run forward.
            each += self.element * ((self.blocks - again) * self.layer + self.table * self.last)
            casts = self.element * again * self.layer
        return each * self._under_way() + casts

    def _messages(self, at_loss: bool) -> float:
        """Return the bytes on their way between stages."""
        ranks, each = self.layout.pipeline, len(self.stages)
        # Behind a frozen embedding the first rank has no gradient to pass on.
        streams = 2.0 if at_loss else 3.0 if self.adapters and self.first else 5.0
        if each > 1:  # received ahead for each stage
            streams = (1.5 if at_loss else 2) * ranks * each
        return streams * self.tokens * self.config.model.hidden_size * self.element / self.sequence

    def _under_way(self) -> float:
        """Return how many microbatches this rank has run forward and not backward, at most, of all its stages."""
        p, m = self.layout.pipeline, self.microbatches
        if p == 1:
            return 1.0
        schedule, each = self.config.parallel.pipeline_schedule, self.config.parallel.stages_per_rank
        if schedule == "interleaved":
            started = min((p - self.rank - 1) * 2 + (each - 1) * p + 1, m * each)
            return started / each
        if schedule == "zero_bubble" and each > 1:
            return float(min(p, m))
        return float(min(p - self.rank, m))

    def _block(self, recomputed: int) -> float:
        """Return the bytes per token that a block keeps for its backward pass."""
        model, tensor, sequence = self.config.model, self.layout.tensor, self.sequence
        hidden = float(model.hidden_size)
        heads = model.num_attention_heads / tensor
        queries, keys = heads * model.head_size, model.kv_heads / tensor * model.head_size
        inner = model.intermediate_size / tensor
        if not self.program.gated_mlp:
            inner = 1.5 * inner
        products = 2 if self.program.gated_mlp else 1
        if recomputed:
            kept = hidden / sequence * self.element
            if self.config.compute.recompute_keep == "matmuls":
                outputs = 2 * queries + 2 * keys + products * inner + 2 * hidden / sequence
                kept += outputs * self.element + 4 * heads
                kept += self.adapters.product_bytes if self.adapters else 0.0
            elif self.program.halved_recompute:  # q, v, attention, gate and down are kept
                outputs = 2 * queries + keys + inner + hidden / sequence
                kept += outputs * self.element + 4 * heads
            return kept
        if self.adapters:
            return self.adapters.block_bytes(self.sequence, self.program.fused)
        # Norms keep their input and result in float32, the products their inputs; attention its own and its result.
        norms = (16 * hidden + 8) / sequence
        inputs = 2 * hidden * self.element
        attention = (2 * queries + 2 * keys) * self.element + 4 * heads
        if model.qk_norm:
            attention += 8 * (queries + keys) + 4 * (heads + model.kv_heads / tensor)
        mlp = (2 * products if self.program.gated_mlp else 2) * inner * self.element
        if self.program.fused:  # results of norms and activation are made again from what is kept
            norms, mlp = 2 * hidden / sequence * self.element + 8 / sequence, (products + 1) * inner * self.element
        return norms + inputs + attention + mlp


def fits(memory: Memory, cluster: Cluster) -> bool:
    """Whether a rank's peak is within its device's memory."""
    return memory.bytes <= cluster.memory_gib * GIB
