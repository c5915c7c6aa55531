"""What settings of adapters say of themselves, against the built model."""

import pytest
import torch

from ternlm.config.adapter import AdapterConfig, matrix_shapes
from ternlm.config.model import ModelConfig
from ternlm.model.decoder import build_model
from ternlm.model.linear import adapt, adapted

MODELS = {
    "mha": ModelConfig(preset="tiny"),
    "gqa": ModelConfig(preset="tiny-gqa", head_dim=32, tie_word_embeddings=True, qk_norm=True),
    "7b": ModelConfig(preset="internlm-7b"),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"kind": "dora", "rank": 8}, {"targets": ("q_proj", "down_proj")}, {"base": "nf4", "kind": "dora"}],
    ids=str,
)
def test_as_many_parameters_are_trained_as_the_settings_say(model, settings):
    adapter = AdapterConfig(**settings)
    with torch.device("meta"):
        built = build_model(model)
    adapt(built, adapter, torch.bfloat16)
    assert sum(p.numel() for p in built.parameters() if p.requires_grad) == adapter.num_params(model)
    shapes = {name: (one.lora_B.out_features, one.lora_A.in_features) for name, one in adapted(built).items()}
    every = matrix_shapes(model)
    assert all(shape == every[name.rpartition(".")[2]] for name, shape in shapes.items())
    assert len(shapes) == model.num_hidden_layers * len(adapter.targets)
