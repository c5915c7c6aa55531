"""Linear maps with adapters, against the definitions and, in the whole model, against the library peft."""

import pytest
import torch

from ternlm.config.adapter import AdapterConfig
from ternlm.config.model import ModelConfig
from ternlm.model.decoder import build_empty_model
from ternlm.model.linear import AdaptedLinear, adapt, adapted

CPU = torch.device("cpu")
MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, attention_bias=True,
)  # fmt: skip


def random_linear(kind="lora", bias=True, **settings):
    torch.manual_seed(0)
    linear = AdaptedLinear(24, 40, bias, AdapterConfig(kind=kind, rank=4, alpha=6.0, **settings))
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if linear.magnitude is not None:
        linear.magnitude.data.abs_()
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_lora_adds_a_scaled_product(bias, rank_stabilized):
    linear = random_linear(bias=bias, rank_stabilized=rank_stabilized)
    x = torch.randn(5, 24)
    scale = 6.0 / (2.0 if rank_stabilized else 4.0)
    weight = linear.weight + scale * linear.lora_B.weight @ linear.lora_A.weight
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, weight, linear.bias))


def test_doras_rows_have_the_lengths_of_its_magnitude():
    linear = random_linear("dora")
    x = torch.randn(5, 24)
    direction = linear.weight + 1.5 * linear.lora_B.weight @ linear.lora_A.weight
    weight = linear.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, weight, linear.bias), rtol=1e-4, atol=1e-5)


def test_doras_length_is_a_constant_in_backward():
    linear = random_linear("dora")
    x = torch.randn(5, 24)
    linear(x).square().sum().backward()
    found = linear.lora_B.weight.grad.clone()
    factor = (linear.magnitude / linear.lengths()).detach()
    a, b = linear.lora_A.weight.detach(), linear.lora_B.weight.detach().requires_grad_()
    out = torch.nn.functional.linear(x, factor[:, None] * (linear.weight + 1.5 * b @ a), linear.bias)
    out.square().sum().backward()
    torch.testing.assert_close(found, b.grad, rtol=1e-4, atol=1e-4)


def test_only_adapters_are_trained_and_only_of_the_targets():
    adapter = AdapterConfig(kind="dora", targets=("q_proj", "down_proj"))
    model = build_empty_model(MODEL, CPU, lambda model: adapt(model, adapter, torch.bfloat16))
    assert set(adapted(model)) == {
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")
    }
    for name, parameter in model.named_parameters():
        trained = ".lora_" in name or name.endswith("magnitude")
        assert parameter.requires_grad == trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name


def test_four_bit_weights_are_what_they_are_rounded_to():
    linear = random_linear()
    weight, x = linear.weight.detach(), torch.randn(5, 24, requires_grad=True)
    linear.pack(64)
    linear.packed.fill(weight)
    out = linear(x)
    rounded = linear.frozen()
    assert (rounded - weight).abs().max() < 0.16 * weight.abs().max()  # half of the widest gap between levels
    effective = rounded + 1.5 * linear.lora_B.weight @ linear.lora_A.weight
    torch.testing.assert_close(out, torch.nn.functional.linear(x, effective, linear.bias))
    out.square().sum().backward()
    again = x.detach().requires_grad_()
    torch.nn.functional.linear(again, effective.detach(), linear.bias.detach()).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)
