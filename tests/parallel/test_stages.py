import pytest
import torch

from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError
from ternlm.config.stages import split_layers
from ternlm.model.decoder import build_model
from ternlm.parallel.stages import cut_stage, join_stages

CONFIG = ModelConfig(preset="tiny-gqa", num_hidden_layers=5, attention_bias=True, qk_norm=True)


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
