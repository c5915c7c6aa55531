"""The pipeline's plan: which layers make a stage, which rank has it, and what each schedule asks of a run."""

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ternlm.config.model import ModelConfig
from ternlm.config.run import Config
from ternlm.config.section import ConfigError

if TYPE_CHECKING:  # layout.py calls this file
    from ternlm.config.layout import Layout


class OwnStage(NamedTuple):
    """Consecutive layers that a rank has; without a pipeline all of them."""

    number: int
    """Among all stages of the model, in order."""
    layers: range
    first: bool = True
    """Whether the embedding is here too; likewise, the final norm and the head."""
    last: bool = True
    before: int = 0
    """Which rank of the pipeline has the stage before; likewise, the stage after."""
    after: int = 0


def own_stages(config: Config, ranks: int, rank: int) -> list[OwnStage]:
    """Return the stages that `rank` of a pipeline of `ranks` has, in the order of the model."""
    schedule, each = config.parallel.pipeline_schedule, config.parallel.stages_per_rank
    count = ranks * each
    layers = split_layers(config.model.num_hidden_layers, count, *stage_costs(config.model, config.data.seq_len))
    rank_of = {stage: other for other in range(ranks) for stage in stages_of(other, ranks, schedule, each)}
    return [
        OwnStage(i, layers[i], i == 0, i == count - 1, rank_of.get(i - 1, 0), rank_of.get(i + 1, 0))
        for i in stages_of(rank, ranks, schedule, each)
    ]


def check_pipeline(config: Config, layout: "Layout") -> None:
    """Raise ConfigError where the schedule can't run this model, or a size that the batch will have."""
    if layout.pipeline == 1:
        return
    stages = layout.pipeline * config.parallel.stages_per_rank
    if stages > config.model.num_hidden_layers:
        raise ConfigError(
            f"parallel.pipeline x stages_per_rank = {stages} must be at most model.num_hidden_layers = "
            f"{config.model.num_hidden_layers}; lower one of them"
        )
    if config.model.tie_word_embeddings:
        raise ConfigError(
            "model.tie_word_embeddings = true needs embedding and head on one rank; set parallel.pipeline=1 or untie"
        )
    if config.parallel.pipeline_schedule == "zero_bubble":
        _check_zero_bubble(config, layout)
    batch = config.batch
    every = batch.rampup.every if batch.rampup else config.train.steps
    for sequences in sorted({batch.sequences_at(step) for step in range(0, config.train.steps, every)}):
        _check_microbatches(config, layout, sequences)


def _check_zero_bubble(config: Config, layout: "Layout") -> None:
    what = "parallel.pipeline_schedule = 'zero_bubble' makes weight gradients later than input gradients"
    if config.compute.compile != "off":
        raise ConfigError(f"{what}, which a compiled block can't; set compute.compile=off or another schedule")
    if config.compute.recompute:
        raise ConfigError(
            f"{what}, and would recompute a block for each of its weights; set compute.recompute=0 or another schedule"
        )
    if layout.grads > 1:
        raise ConfigError(
            f"{what}, so weights and gradients stay whole during a step; set sharding.params=1 and sharding.grads=1, "
            "or another schedule"
        )


def _check_microbatches(config: Config, layout: "Layout", sequences: int) -> None:
    """Refuse a global batch whose microbatches don't fill the pipeline, or not in rounds of one size."""
    schedule, rows, ranks = config.parallel.pipeline_schedule, config.batch.microbatch_sequences, layout.pipeline
    count = sequences // (rows * layout.data)
    found = f"{sequences} sequences / ({rows} x {layout.data} data-parallel ranks) = {count}"
    if count < ranks:
        raise ConfigError(
            f"the pipeline needs at least {ranks} microbatches a step, and has {found}; raise the global batch or "
            "lower parallel.pipeline"
        )
    # PyTorch's schedules of several stages a rank, or of split backwards, go in rounds of at least `ranks`.
    in_rounds = schedule != "1f1b" and not is_v_shaped(schedule, config.parallel.stages_per_rank)
    if in_rounds and count % (count // ranks):
        raise ConfigError(
            f"the microbatches of a step must be a multiple of parallel.pipeline = {ranks} with pipeline_schedule = "
            f"{schedule!r}, and are {found}; change the global batch or set pipeline_schedule=1f1b"
        )


def stage_costs(config: ModelConfig, seq_len: int) -> tuple[float, float, float]:
    """Return the operations per token, forward and backward, of a layer, of the embedding and of the head.

    6 per weight and causal attention over undivided sequences; the embedding is a lookup and counts nothing.
    """
    attention = 6.0 * config.num_attention_heads * config.head_size * seq_len
    return 6.0 * config.num_layer_params + attention, 0.0, 6.0 * config.vocab_size * config.hidden_size


@functools.lru_cache(maxsize=1024)  # a search asks again and again
def split_layers(
    num_layers: int, num_stages: int, layer_cost: float, embed_cost: float, head_cost: float
) -> list[range]:
    """Cut the layers into consecutive stages so that the dearest stage is as cheap as it can be.

    The first stage has the embedding too and the last the head. Each has a layer at least, so that there must be as
    many layers as stages. Of the cuts with the same
    dearest stage, the most even one is returned (least sum of squared costs).
    """

    def cost(stage: int, layers: int) -> float:
        return layers * layer_cost + (embed_cost if stage == 0 else 0) + (head_cost if stage == num_stages - 1 else 0)

    def cheapest(weigh: Callable[[float, float], float], limit: float) -> tuple[float, list[int]]:
        # best[n] is the least weight with which the stages so far hold n layers, and where they were cut.
        best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
        for stage in range(num_stages):
            further: dict[int, tuple[float, list[int]]] = {}
            for before, (weight, cuts) in best.items():
                for end in range(before + 1, num_layers + 1):
                    own = cost(stage, end - before)
                    total = weigh(weight, own)
                    if own <= limit and (end not in further or total < further[end][0]):
                        further[end] = total, [*cuts, end]
            best = further
        return best[num_layers]

    dearest, _ = cheapest(max, float("inf"))
    _, cuts = cheapest(lambda weight, own: weight + own * own, dearest)
    return [range(start, end) for start, end in pairwise(cuts)]


def stages_of(rank: int, ranks: int, schedule: str, stages_per_rank: int) -> list[int]:
    """Return the stages that `rank` of the pipeline has, in the order of the model.

    Round and round, rank r has r, r + ranks and so on; in a V (zero_bubble with 2 stages a rank, arXiv 2401.10241
    section 6), rank r has r and, from the other end, 2 * ranks - 1 - r, so that rank 0 has the first and the last.
    """
    if is_v_shaped(schedule, stages_per_rank):
        return [rank, 2 * ranks - 1 - rank]
    return list(range(rank, ranks * stages_per_rank, ranks))


def is_v_shaped(schedule: str, stages_per_rank: int) -> bool:
    """Whether stages go down the ranks and up again."""
    return schedule == "zero_bubble" and stages_per_rank == 2
