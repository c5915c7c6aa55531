import itertools
import random
from typing import Any

import pytest

from ternlm.config import Config, ConfigError, config_from_dict
from ternlm.config.layout import resolve_layout
from ternlm.config.model import ModelConfig
from ternlm.config.stages import own_stages, split_layers, stage_costs, stages_of


def test_layers_are_split_so_that_the_dearest_stage_is_as_cheap_as_can_be():
    rng = random.Random(0)
    for _ in range(200):
        layers = rng.randrange(1, 9)
        stages = rng.randrange(1, layers + 1)
        costs = rng.choice([0.5, 1.0, 2.0]), rng.choice([0.0, 0.3, 3.0]), rng.choice([0.0, 1.0, 2.5])
        cuts = split_layers(layers, stages, *costs)
        assert list(itertools.chain(*cuts)) == list(range(layers))
        assert all(cuts)
        inner = itertools.combinations(range(1, layers), stages - 1)
        every = [[range(a, b) for a, b in itertools.pairwise([0, *ends, layers])] for ends in inner]
        best = min((max(loads(each, *costs)), sum(load * load for load in loads(each, *costs))) for each in every)
        found = loads(cuts, *costs)
        assert (max(found), sum(load * load for load in found)) == pytest.approx(best)


def loads(cuts, layer, embed, head):
    costs = [len(layers) * layer for layers in cuts]
    costs[0] += embed
    costs[-1] += head
    return costs


def test_a_large_vocabulary_takes_layers_from_the_last_stage():
    costs = stage_costs(ModelConfig(preset="internlm-7b"), 2048)
    assert [len(layers) for layers in split_layers(32, 4, *costs)] == [8, 9, 9, 6]


def test_stages_go_round_the_ranks_or_down_and_up():
    assert [stages_of(rank, 4, "1f1b", 1) for rank in range(4)] == [[0], [1], [2], [3]]
    assert [stages_of(rank, 2, "interleaved", 3) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert [stages_of(rank, 2, "zero_bubble", 2) for rank in range(2)] == [[0, 3], [1, 2]]
    assert [stages_of(rank, 2, "zero_bubble", 1) for rank in range(2)] == [[0], [1]]


def test_each_stage_knows_who_has_its_neighbours() -> None:
    config = make("zero_bubble", 2, 4)
    found = [[(s.number, s.first, s.last, s.before, s.after) for s in own_stages(config, 4, rank)] for rank in (0, 3)]
    assert found == [
        [(0, True, False, 0, 1), (7, False, True, 1, 0)],
        [(3, False, False, 2, 3), (4, False, False, 3, 2)],
    ]


def make(schedule: str, stages_per_rank: int, sequences: int, **changes: dict[str, Any]) -> Config:
    """Return the settings of a pipeline of 4 ranks, with 4 times as many data-parallel ones where states are cut."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"preset": "tiny-gqa", "vocab_size": 250, "num_hidden_layers": 9},
        "data": {"seq_len": 24, "sources": [{"name": "en", "path": "data/en"}]},
        "batch": {"global_sequences": sequences},
        "train": {"steps": 100},
        "compute": {"compile": "off"},
        "parallel": {"pipeline": 4, "pipeline_schedule": schedule, "stages_per_rank": stages_per_rank}
        | {"allow_untested": True},
        "sharding": {"optimizer": 1},
    }
    for name, values in changes.items():
        settings[name] = {**settings.get(name, {}), **values}
    return config_from_dict(settings)


RAMPUP = {"rampup": {"start": 8, "increment": 1, "every": 10}}


@pytest.mark.parametrize(
    ("schedule", "stages_per_rank", "sequences", "changes", "message"),
    [
        ("1f1b", 1, 3, {}, r"at least 4 microbatches a step, and has 3 sequences / \(1 x 1 .*\) = 3; raise the global"),
        ("1f1b", 1, 5, {"compute": {"compile": "on", "recompute": 1.0}}, None),
        ("interleaved", 2, 4, {}, None),
        ("interleaved", 2, 10, {}, None),
        ("interleaved", 2, 9, {}, r"multiple of parallel\.pipeline = 4 with .*'interleaved', and are 9 sequences"),
        ("interleaved", 3, 12, {}, r"stages_per_rank = 12 must be at most model\.num_hidden_layers = 9"),
        ("zero_bubble", 1, 9, {}, r"must be a multiple of parallel\.pipeline = 4"),
        ("zero_bubble", 2, 9, {}, None),
        ("zero_bubble", 1, 8, {"compute": {"compile": "on"}}, r"set compute\.compile=off"),
        ("zero_bubble", 1, 8, {"compute": {"compile": "auto"}}, r"set compute\.compile=off"),
        ("zero_bubble", 1, 8, {"compute": {"recompute": 0.5}}, r"set compute\.recompute=0"),
        ("interleaved", 2, 12, {"batch": RAMPUP}, r"= 4 with .*'interleaved', and are 9 sequences"),
        ("1f1b", 1, 12, {"batch": RAMPUP}, None),
    ],
)
def test_what_a_schedule_cannot_run_is_refused(
    schedule: str, stages_per_rank: int, sequences: int, changes: dict[str, Any], message: str | None
) -> None:
    config = make(schedule, stages_per_rank, sequences, **changes)
    if message is None:
        assert resolve_layout(config, 4).pipeline == 4
        return
    with pytest.raises(ConfigError, match=message):
        resolve_layout(config, 4)


def test_split_backwards_need_whole_gradients() -> None:
    config = make("zero_bubble", 1, 16, sharding={"grads": 2, "optimizer": 2})
    with pytest.raises(ConfigError, match=r"set sharding\.params=1 and sharding\.grads=1"):
        resolve_layout(config, 8)
