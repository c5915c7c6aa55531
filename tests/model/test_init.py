import math

import pytest
import torch

from ternlm.config.model import ModelConfig
from ternlm.model.decoder import build_model
from ternlm.model.init import init_weights, parameter_std


def initialised(config, seed=1):
    model = build_model(config)
    init_weights(model, config, seed)
    return model


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    config = ModelConfig(preset="tiny", attention_bias=True)
    first, again, other = (initialised(config, seed).state_dict() for seed in (1, 1, 2))
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.ndim == 2:
            assert not torch.equal(weight, other[name])


def test_a_parameters_values_do_not_depend_on_the_rest_of_the_model():
    small = initialised(ModelConfig(preset="tiny")).state_dict()
    deep = initialised(ModelConfig(preset="tiny", num_hidden_layers=3)).state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(small[name], deep[name])


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("model.embed_tokens.weight", 0.0052),
        ("lm_head.weight", 0.0052),
        ("model.layers.3.self_attn.q_proj.weight", 0.006),
        ("model.layers.3.self_attn.v_proj.weight", 0.006),
        ("model.layers.3.self_attn.o_proj.weight", 0.006 / math.sqrt(8)),
        ("model.layers.3.mlp.gate_proj.weight", 0.006),
        ("model.layers.3.mlp.up_proj.weight", 0.006 / math.sqrt(8)),
        ("model.layers.3.mlp.down_proj.weight", 0.0015),
        ("model.layers.3.self_attn.q_proj.bias", None),
        ("model.layers.3.input_layernorm.weight", None),
        ("model.norm.weight", None),
    ],
)
def test_internlm_deviations_are_the_ancestors(name, std):
    assert parameter_std(name, ModelConfig(preset="internlm-7b")) == std


def test_drawn_weights_have_their_deviation():
    config = ModelConfig(preset="tiny", hidden_size=256, attention_bias=True, qk_norm=True)
    for name, parameter in initialised(config).named_parameters():
        std = parameter_std(name, config)
        if std is None:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0))
        else:
            assert abs(parameter.std().item() / std - 1) < 0.05
            assert abs(parameter.mean().item()) < 0.05 * std


def test_plain_init_shrinks_what_writes_the_residual():
    config = ModelConfig(preset="tiny", init={"kind": "plain", "std": 0.02})
    assert parameter_std("model.layers.0.mlp.down_proj.weight", config) == 0.02 / 2
    assert parameter_std("model.layers.0.mlp.up_proj.weight", config) == 0.02
