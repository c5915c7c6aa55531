"""Llama 3.1's scaled positions in GGUF: the tensor of llama.cpp's converter, and what it makes of logits."""

import dataclasses
import math

import gguf
import pytest
import torch
from gguf_models import (
    LlamaCpp,
    built,
    largest_difference,
    next_logprobs,
    random_model,
    repack,
    small_config,
    small_tokenizer,
)

from ternlm.convert.detect import open_foreign
from ternlm.convert.gguf_read import open_gguf
from ternlm.convert.gguf_write import write_gguf
from ternlm.convert.weights import ConvertError

FACTORS = "rope_freqs.weight"
OWN = [f"ternlm.rope_scaling.{name}" for name in ("factor", "low_freq_factor", "high_freq_factor")]
OWN.append("ternlm.rope_scaling.original_max_position_embeddings")
LLAMA3 = dict(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def written(path):
    """The tensor as the package gguf reads it."""
    found = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == FACTORS]
    return torch.from_numpy(found[0].data.copy()) if found else None


def wanted(head, theta, factor, low, high, trained):
    """What a frequency is divided by, from its wavelength in tokens, as Llama 3.1's authors put it."""
    factors = []
    for index in range(0, head, 2):
        wavelength = 2 * math.pi * theta ** (index / head)
        if wavelength < trained / high:
            factors.append(1.0)
        elif wavelength > trained / low:
            factors.append(factor)
        else:
            smooth = (trained / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)


@pytest.mark.parametrize(
    ("head", "theta", "factor", "low", "high", "trained"),
    [
        (128, 5e5, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        (64, 5e5, 32.0, 1.0, 4.0, 8192),  # Llama 3.2 1B
        (16, 1e4, 8.0, 1.0, 4.0, 32),
        (128, 1e6, 4.0, 1.0, 8.0, 4096),
        (128, 5e5, 8.0, 2.0, 6.0, 8192),
    ],
)
def test_the_tensor_is_llama_3s_and_its_settings_are_found_again(tmp_path, head, theta, factor, low, high, trained):
    scaling = dict(kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high)
    scaling["original_max_position_embeddings"] = trained
    config = small_config(head_dim=head, rope_theta=theta, rope_scaling=scaling, max_position_embeddings=16 * trained)
    write_gguf(random_model(config), tmp_path / "model.gguf")
    found = written(tmp_path / "model.gguf")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted(head, theta, factor, low, high, trained), rtol=1e-5, atol=0)
    ours = open_gguf(tmp_path / "model.gguf")
    assert ours.config == (config if head != 16 else config.model_copy(update={"head_dim": None}))
    # From a file of another program, which doesn't tell the settings.
    repack(tmp_path / "model.gguf", tmp_path / "other.gguf", **{name.replace(".", "__"): None for name in OWN})
    guessed = open_gguf(tmp_path / "other.gguf").config.rope_scaling
    if low == 1:
        assert guessed == config.rope_scaling
    else:  # twice the bounds and twice the length are the same
        assert guessed.high_freq_factor == high / low
        assert guessed.original_max_position_embeddings == trained / low
    again = open_gguf(tmp_path / "other.gguf")
    write_gguf(dataclasses.replace(again, weights=ours.weights), tmp_path / "again.gguf")
    torch.testing.assert_close(written(tmp_path / "again.gguf"), found, rtol=1e-6, atol=0)


def test_a_tensor_of_ones_is_no_scaling(tmp_path):
    write_gguf(random_model(small_config()), tmp_path / "model.gguf")
    assert written(tmp_path / "model.gguf") is None
    again = open_gguf(repack(tmp_path / "model.gguf", tmp_path / "ones.gguf", extra={FACTORS: [1.0] * 8}))
    assert again.config == small_config()


def test_what_cannot_be_said_with_norms_of_q_and_k_is_refused(tmp_path):
    model = random_model(small_config(qk_norm=True, rope_scaling=LLAMA3))
    with pytest.raises(ConvertError, match=r"'llama3' together with norms of q and k \(qk_norm\)"):
        write_gguf(model, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [24, 96, 240])
def test_llama_cpp_and_transformers_agree_past_the_trained_length(tmp_path, length):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **{k: v for k, v in LLAMA3.items() if k != "kind"}}
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=256, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if "norm" in name else 0.0))
    theirs.save_pretrained(tmp_path / "hf")
    opened = dataclasses.replace(open_foreign(tmp_path / "hf"), tokenizer=small_tokenizer())
    assert opened.config.rope_scaling.kind == "llama3"
    write_gguf(opened, tmp_path / "model.gguf", "float32")
    tokens = torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        logprobs = theirs(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    top = LlamaCpp(tmp_path / "model.gguf").next_logprobs(tokens)
    assert largest_difference(top, logprobs) < 0.01
    again = open_gguf(tmp_path / "model.gguf")
    assert largest_difference(top, next_logprobs(built(again), tokens)) < 0.01
    # Without the tensor it is another model.
    repack(tmp_path / "model.gguf", tmp_path / "without.gguf", without=[FACTORS])
    other = LlamaCpp(tmp_path / "without.gguf").next_logprobs(tokens)
    assert max(abs(other[token] - logprobs[token].item()) for token in other) > 0.02


def test_settings_that_the_tensor_contradicts_are_refused(tmp_path):
    write_gguf(random_model(small_config(rope_scaling=LLAMA3)), tmp_path / "model.gguf")
    for name, value in (("factor", 4.0), ("original_max_position_embeddings", 64), ("low_freq_factor", 9.0)):
        changes = {f"ternlm__rope_scaling__{name}": value}
        with pytest.raises(ConvertError, match=r"isn't what Llama 3.1's scaling makes|make no model"):
            open_gguf(repack(tmp_path / "model.gguf", tmp_path / f"{name}.gguf", **changes))
