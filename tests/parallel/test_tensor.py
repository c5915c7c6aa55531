import pytest
import torch

from ternlm.config.adapter import AdapterConfig
from ternlm.config.model import ModelConfig
from ternlm.model.decoder import build_model
from ternlm.model.linear import adapt
from ternlm.parallel.tensor import cut_dimension, cut_tensors, has_partial_gradient


def shapes(**settings):
    with torch.device("meta"):
        model = build_model(ModelConfig(preset="tiny-gqa", attention_bias=True, qk_norm=True, **settings))
    return dict(model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_matches_exactly_one_pattern_of_the_plan(tied):
    for name, parameter in shapes(tie_word_embeddings=tied).items():
        dim = cut_dimension(name)
        assert dim is None or dim < parameter.ndim
        assert (dim is None) == ("norm" in name or name.endswith("o_proj.bias"))


def test_an_unknown_parameter_is_an_error_not_whole():
    with pytest.raises(KeyError, match=r"0 patterns of the tensor plan match model\.layers\.0\.adapter\.weight"):
        cut_dimension("model.layers.0.adapter.weight")


def test_whole_parameters_that_see_a_part_of_the_data_have_partial_gradients():
    partial = {name for name in shapes() if has_partial_gradient(name, sequence=True)}
    assert partial == {name for name in shapes() if cut_dimension(name) is None}
    partial = {name for name in shapes() if has_partial_gradient(name, sequence=False)}
    assert partial == {name for name in shapes() if name.endswith(("q_norm.weight", "k_norm.weight"))}


def test_what_is_frozen_stays_so_when_it_is_cut():
    class Pair:
        def size(self):
            return 2

        def rank(self):
            return 0

    with torch.device("meta"):
        model = build_model(ModelConfig(preset="tiny-gqa", attention_bias=True))
    adapt(model, AdapterConfig(kind="dora"), torch.bfloat16)
    cut_tensors(model, Pair(), sequence=True)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 64)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name or "magnitude" in name}
