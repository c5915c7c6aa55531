import itertools
import random

import pytest
import torch

from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError
from ternlm.model.decoder import build_model
from ternlm.parallel.stages import cut_stage, join_stages, split_layers, stage_costs, stages_of

CONFIG = ModelConfig(preset="tiny-gqa", num_hidden_layers=5, attention_bias=True, qk_norm=True)


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


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match=r"5 stages needs as many layers, and model\.num_hidden_layers = 4; lower"):
        split_layers(4, 5, 1.0, 0.0, 1.0)


def test_stages_go_round_the_ranks_or_down_and_up():
    assert [stages_of(rank, 4, "1f1b", 1) for rank in range(4)] == [[0], [1], [2], [3]]
    assert [stages_of(rank, 2, "interleaved", 3) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert [stages_of(rank, 2, "zero_bubble", 2) for rank in range(2)] == [[0, 3], [1, 2]]
    assert [stages_of(rank, 2, "zero_bubble", 1) for rank in range(2)] == [[0], [1]]


def test_stages_have_the_names_of_the_whole_model_each_once():
    with torch.device("meta"):
        model = build_model(CONFIG)
    cuts = split_layers(5, 3, 1.0, 0.0, 1.0)
    stages = [cut_stage(model, cuts[i], first=i == 0, last=i == 2) for i in range(3)]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(shapes)
    assert {name: p.shape for stage in stages for name, p in stage.named_parameters()} == shapes
    joined = join_stages([stages[0], stages[2]])
    assert {name for name, _ in joined.named_parameters()} == {
        name for stage in (stages[0], stages[2]) for name, _ in stage.named_parameters()
    }
    assert len(list(joined.model.layers)) == len(cuts[0]) + len(cuts[2])


def test_tied_embeddings_are_not_parted():
    with torch.device("meta"):
        model = build_model(CONFIG.model_copy(update={"tie_word_embeddings": True}))
    with pytest.raises(ConfigError, match=r"set parallel\.pipeline=1 or untie"):
        cut_stage(model, range(2), first=True, last=False)
