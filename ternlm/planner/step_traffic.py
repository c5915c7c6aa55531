"""What one rank of a layout sends and receives in one training step, computed from the settings.

The program it speaks of is `ternlm.train.step` on `ternlm.parallel`, run uncompiled; a test holds it to what that
program was seen to do. Leaves out what the host agrees on beside the step. No torch here.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ternlm.config.adapter import ALL_TARGETS, AdapterConfig, Target, matrix_shapes
from ternlm.config.layout import Layout, Place, resolve_layout
from ternlm.config.model import ModelConfig
from ternlm.config.run import Config
from ternlm.config.stages import own_stages
from ternlm.config.training import recomputed_blocks
from ternlm.planner.frozen import ALL_PASSED, CUT_BY_INPUTS, passed_at_entry
from ternlm.planner.traffic import Traffic, add_up, axis_ranks, lie_on_several_nodes, world_axis
from ternlm.planner.work import element_bytes, kept_bytes

FLOAT32, FLOAT64, INT64 = 4, 8, 8
_JOINED_ELEMENTS = 2**26  # pieces that cross groups go together, in calls of about so many elements


@dataclass(frozen=True)
class Parameter:
    """One parameter on a tensor-parallel rank."""

    name: str
    shape: tuple[int, ...]
    whole_shape: tuple[int, ...]
    partial: bool = False
    """Whether tensor ranks have parts of a sum as its gradient."""
    trained: bool = True

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])


@functools.lru_cache(maxsize=64)  # a search asks again and again
def parameters(
    model: ModelConfig, tensor: int = 1, sequence: bool = True, adapter: AdapterConfig | None = None
) -> tuple[tuple[Parameter, ...], ...]:
    """Return the parameters in the model's order: the embedding, each block, the final norm, the head where untied.

    adapter: of a run that trains nothing else; matrices in 4 bits are no parameters.
    """
    d, h = model.hidden_size, model.head_size

    def one(name: str, *shape: int, cut: int | None = None, partial: bool = False, trained: bool = False) -> Parameter:
        own = tuple(n // tensor if dim == cut else n for dim, n in enumerate(shape))
        return Parameter(name, own, shape, partial and tensor > 1, trained or adapter is None)

    def matrix(part: str, name: Target, bias: bool) -> Iterator[Parameter]:
        (rows, columns), own, cut = matrix_shapes(model)[name], f"{part}.{name}", int(name in CUT_BY_INPUTS)
        adapted = adapter if adapter and name in adapter.targets else None
        if not (adapted and adapted.base == "nf4"):
            yield one(f"{own}.weight", rows, columns, cut=cut)
        if bias:
            yield one(f"{own}.bias", rows, cut=0 if not cut else None, partial=bool(cut) and sequence)
        if not adapted:
            return
        if adapted.kind == "dora":
            yield one(f"{own}.magnitude", rows, cut=0 if not cut else None, partial=bool(cut), trained=True)
        a_cut, b_cut = (1, None) if cut else (None, 0)
        yield one(f"{own}.lora_A.weight", adapted.rank, columns, cut=a_cut, partial=not cut, trained=True)
        yield one(f"{own}.lora_B.weight", rows, adapted.rank, cut=b_cut, partial=bool(cut), trained=True)

    def block(layer: int) -> Iterator[Parameter]:
        prefix = f"model.layers.{layer}"
        for name in ALL_TARGETS[:4]:
            yield from matrix(f"{prefix}.self_attn", name, model.attention_bias)
        if model.qk_norm:  # each rank sees some of the heads
            yield one(f"{prefix}.self_attn.q_norm.weight", h, partial=True)
            yield one(f"{prefix}.self_attn.k_norm.weight", h, partial=True)
        for name in ALL_TARGETS[4:]:
            yield from matrix(f"{prefix}.mlp", name, False)
        yield one(f"{prefix}.input_layernorm.weight", d, partial=sequence)
        yield one(f"{prefix}.post_attention_layernorm.weight", d, partial=sequence)

    units: list[tuple[Parameter, ...]] = [(one("model.embed_tokens.weight", model.vocab_size, d, cut=0),)]
    units += [tuple(block(layer)) for layer in range(model.num_hidden_layers)]
    units += [(one("model.norm.weight", d, partial=sequence),)]
    if not model.tie_word_embeddings:
        units += [(one("lm_head.weight", model.vocab_size, d, cut=0),)]
    return tuple(units)


def step_traffic(
    config: Config,
    world: int,
    rank: int = 0,
    devices_per_node: int = 8,
    metrics: int = 4,
    layout: Layout | None = None,
) -> list[Traffic]:
    """Return all collectives of one step of full batch size, by kind.

    metrics: sums that the loss reports for each source. layout: what `resolve_layout` would return, where the caller
    has it. Raises ConfigError where the layout doesn't fit.
    """
    layout = layout or resolve_layout(config, world)
    step = _Step(config, layout, layout.place(rank), devices_per_node)
    return [traffic for traffic in add_up(step.all(metrics)) if traffic.count]


class _Step:
    """One rank's step."""

    def __init__(self, config: Config, layout: Layout, place: Place, devices_per_node: int) -> None:
        self.config, self.layout, self.place = config, layout, place
        self.devices_per_node = devices_per_node
        self.stages = stages = own_stages(config, layout.pipeline, place.pipeline)
        self.axes = axis_ranks(layout, place)
        self.element = element_bytes(config)
        self.reduced = reduced_bytes(config)
        self.rows = config.batch.microbatch_sequences
        self.microbatches = config.batch.global_sequences // (self.rows * layout.data)
        self.tokens = config.data.seq_len // layout.context
        embedding, *rest = parameters(config.model, layout.tensor, config.parallel.sequence, config.adapter)
        count = config.model.num_hidden_layers
        blocks, norm, head = rest[:count], rest[count], rest[count + 1 :]  # no head of its own where it is tied
        # Of each stage, what FSDP gathers one at a time, and the rest, which is gathered once.
        units, rests = [], []
        for stage in stages:
            units += [blocks[layer] for layer in stage.layers] + (head if stage.last else [])
            rests += [(embedding if stage.first else ()) + (norm if stage.last else ())]
        self.units, self.rests = _alike(units), _alike(rest for rest in rests if rest)
        self.first, self.last = any(stage.first for stage in stages), any(stage.last for stage in stages)
        self.blocks = sum(len(stage.layers) for stage in stages)
        own = [block for stage in stages for block in (blocks[layer] for layer in stage.layers)]
        ends = [embedding] * self.first, [norm] * self.last
        joined = [*ends[0], *ends[1], *own] if layout.pipeline > 1 else [*ends[0], *own, *ends[1]]
        self.own = [one for unit in [*joined, *(head * self.last)] for one in unit if one.trained]
        """Those that are trained, in the order in which the program goes through them."""

    def all(self, metrics: int) -> Iterator[Traffic]:
        """Yield everything."""
        if self.layout.world == 1:
            return
        yield from self.sharding()
        yield from self.across()
        yield from self.tensor()
        yield from self.context()
        yield from self.pipeline()
        if self.config.optimizer.kind == "muon":
            yield from self.muon()
        # The losses' sums, and the gradient's norm.
        yield self.one("all_reduce", "world", (2 + metrics * len(self.config.data.sources)) * FLOAT64)
        yield self.one("all_reduce", "world", FLOAT64)

    def one(self, operation: str, axis: str, payload_bytes: int, count: int = 1) -> Traffic:
        """Make a record; payload_bytes is of one collective."""
        ranks = self.axes[axis]
        name = world_axis(self.layout) if axis == "world" else axis
        between = lie_on_several_nodes(ranks, self.devices_per_node)
        return Traffic(operation, name, len(ranks), between, payload_bytes * count, count)

    def sharding(self) -> Iterator[Traffic]:
        """What FSDP sends: weights gathered, gradients reduce-scattered in the group, and all-reduced over the rest."""
        layout, m = self.layout, self.microbatches
        units = [(unit, n, False) for unit, n in self.units.items()]
        for unit, n, is_rest in [*units, *((rest, n, True) for rest, n in self.rests.items())]:
            elements = sum(_padded(rows, layout.shard) * row for rows, row, _ in unit)
            trained = sum(_padded(rows, layout.shard) * row for rows, row, learns in unit if learns)
            if layout.shard > 1:
                gathers = 1 if not layout.reshard else m if is_rest else 2 * m
                yield self.one("all_gather", "shard", elements * self.element, n * gathers)
                reduced = bool(trained) * n * (m if layout.grads > 1 else 1)
                yield self.one("reduce_scatter", "shard", trained * self.reduced, reduced)
            if layout.across == 1 and "replicas" in self.axes:
                yield self.one("all_reduce", "replicas", trained // layout.shard * self.reduced, n * bool(trained))

    def across(self) -> Iterator[Traffic]:
        """What crosses groups where optimizer states are cut wider: gradients out, updated weights back, in float32."""
        layout = self.layout
        if layout.across == 1:
            return
        for group in self._joined_groups():
            elements = sum(_padded(self._shard_rows(p), layout.across) * p.row for p in group)
            yield self.one("reduce_scatter", "across", elements * FLOAT32)
            yield self.one("all_gather", "across", elements * FLOAT32)
            if "replicas" in self.axes:
                yield self.one("all_reduce", "replicas", elements // layout.across * FLOAT32)

    def tensor(self) -> Iterator[Traffic]:
        """Exchange of activations, statistics of the vocabulary's parts, and the sum of partial gradients."""
        if self.layout.tensor == 1:
            return
        config, m = self.config, self.microbatches
        stream = self.rows * self.tokens * config.model.hidden_size
        # Without FSDP the embedding is float32, and cast after it was summed; a frozen one as it is kept.
        embedded = stream * (self.element if self.layout.data_ranks > 1 else kept_bytes(config))
        stream *= self.element
        blocks, first, last = self.blocks, int(self.first), int(self.last)
        again = recomputed_blocks(blocks, config.compute.recompute)
        learns = int(config.adapter is None)
        # Of the first block, what isn't left and entered backward: attention's output; its input, and the MLP's.
        passed = passed_at_entry(config.adapter) if config.adapter and first else ALL_PASSED
        not_left, not_entered = int(not passed.middle), int(not passed.start) + int(not passed.middle)
        if config.parallel.sequence:
            yield self.one("all_gather", "tensor", embedded, m * first * learns)
            yield self.one("all_gather", "tensor", stream, m * (4 * blocks + last - not_left))
            yield self.one("reduce_scatter", "tensor", embedded, m * first)
            yield self.one("reduce_scatter", "tensor", stream, m * (4 * blocks + last - not_entered))
            # A recomputed block enters attention and the MLP, and leaves attention: what follows isn't needed.
            yield self.one("all_gather", "tensor", stream, m * 2 * again)
            yield self.one("reduce_scatter", "tensor", stream, m * again)
        else:
            yield self.one("all_reduce", "tensor", embedded, m * first)
            yield self.one("all_reduce", "tensor", stream, m * (4 * blocks + again + last - not_entered))
        if self.last:
            yield from self._vocabulary()
        if config.adapter and config.adapter.kind == "dora":  # squares of rows that are cut over ranks
            passes = m * (blocks + again) * len(CUT_BY_INPUTS & set(config.adapter.targets))
            yield self.one("all_reduce", "tensor", config.model.hidden_size * FLOAT32, passes)
        partial = [self._piece_rows(parameter) * parameter.row for parameter in self.own if parameter.partial]
        yield self.one("all_reduce", "tensor", sum(partial) * FLOAT32, int(bool(partial)))

    def context(self) -> Iterator[Traffic]:
        """Exchange of heads, or keys and values on their way round."""
        c, model = self.layout.context, self.config.model
        if c == 1:
            return
        layers, again = self.blocks, 0
        if self.config.compute.recompute_keep == "nothing":
            again = recomputed_blocks(layers, self.config.compute.recompute)
        tensor = self.layout.tensor
        per_head = self.rows * self.tokens * model.head_size * self.element
        queries, keys = model.num_attention_heads // tensor, model.kv_heads // tensor
        if self.config.parallel.context_method == "all_to_all":
            calls = self.microbatches * (2 * layers + again)
            yield self.one("all_to_all", "context", per_head * (queries + 2 * keys), calls)
            yield self.one("all_to_all", "context", per_head * queries, calls)
            return
        # Keys and values with every pass, their gradients with each backward.
        passes = ((self.element, 2 * layers + again), (FLOAT32, layers))
        ranks = self.axes["context"]
        own = ranks.index(self.place.rank)
        for operation, peer in (("send", ranks[(own + 1) % c]), ("recv", ranks[own - 1])):
            between = lie_on_several_nodes((self.place.rank, peer), self.devices_per_node)
            for element, each in passes:
                count = self.microbatches * each * (c - 1)
                size = per_head // self.element * element * 2 * keys
                yield Traffic(operation, "context", 2, between, size * count, count)

    def pipeline(self) -> Iterator[Traffic]:
        """Activations to the next stage, and their gradients back, where it is another rank's."""
        ranks = self.axes.get("pipeline", ())
        stream = self.rows * self.tokens * self.config.model.hidden_size * self.element
        stream //= self.layout.tensor if self.config.parallel.sequence else 1
        for stage in self.stages:
            for missing, neighbour in ((stage.first, stage.before), (stage.last, stage.after)):
                if missing or ranks[neighbour] == self.place.rank:
                    continue
                between = lie_on_several_nodes((self.place.rank, ranks[neighbour]), self.devices_per_node)
                for operation in ("send", "recv"):
                    m = self.microbatches
                    yield Traffic(operation, "pipeline", 2, between, stream * m, m)

    def muon(self) -> Iterator[Traffic]:
        """Whole matrices, which Muon joins from their pieces."""
        for matrix in (parameter for parameter in self.own if ".layers." in parameter.name):
            if len(matrix.shape) < 2:
                continue
            for axis in ("shard", "across", "tensor"):
                if axis in self.axes and (axis != "tensor" or matrix.shape != matrix.whole_shape):
                    yield self.one("all_reduce", axis, math.prod(matrix.whole_shape) * FLOAT32)

    def _vocabulary(self) -> Iterator[Traffic]:
        """The greatest logit, its id, and two or three sums for each token."""
        tokens, chunk = self.rows * self.tokens, chunk_tokens(self.config)
        sums = 3 if self.config.loss.label_smoothing else 2
        for size in (FLOAT32, INT64, sums * FLOAT32):
            whole, last = divmod(tokens, chunk)
            yield self.one("all_reduce", "tensor", size * chunk, whole * self.microbatches)
            yield self.one("all_reduce", "tensor", size * last, bool(last) * self.microbatches)

    def _joined_groups(self) -> list[list[Parameter]]:
        groups: list[list[Parameter]] = [[]]
        held = 0
        for parameter in self.own:
            count = self._shard_rows(parameter) * parameter.row
            if groups[-1] and held + count > _JOINED_ELEMENTS:
                groups.append([])
                held = 0
            groups[-1].append(parameter)
            held += count
        return groups

    def _shard_rows(self, parameter: Parameter) -> int:
        """Return how many rows FSDP leaves this rank."""
        own = (self.place.data * self.layout.context + self.place.context) % self.layout.shard
        return _part(parameter.shape[0], self.layout.shard, own)

    def _piece_rows(self, parameter: Parameter) -> int:
        """Return how many rows this rank's optimizer updates."""
        own = (self.place.data * self.layout.context + self.place.context) % self.layout.optimizer
        return _part(self._shard_rows(parameter), self.layout.across, own // self.layout.shard)


def reduced_bytes(config: Config) -> int:
    """Return the bytes of a number in which gradients are summed over ranks."""
    return 4 if config.sharding.reduce_dtype == "float32" else 2


def chunk_tokens(config: Config) -> int:
    """Return how many tokens' logits a GPU makes at a time."""
    return config.loss.chunk_tokens or max(2**30 // (4 * config.model.vocab_size), 64)


def _alike(units: Iterable[Sequence[Parameter]]) -> Counter[tuple[tuple[int, int, bool], ...]]:
    """Return the rows, their sizes and whether they're trained of each unit's parameters, and how many have these."""
    return Counter(tuple((p.shape[0], p.row, p.trained) for p in unit) for unit in units)


def _padded(rows: int, parts: int) -> int:
    return -(-rows // parts) * parts


def _part(rows: int, parts: int, index: int) -> int:
    """Return the size of a part where all but the last ones have equally many rows."""
    size = -(-rows // parts)
    return min(max(rows - index * size, 0), size)
