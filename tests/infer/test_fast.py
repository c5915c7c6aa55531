"""Fast blocks compute what a model's own do: on its weights as they are now, and packed."""

import copy

import pytest
import torch

from ternlm.config.adapter import AdapterConfig
from ternlm.config.model import ModelConfig
from ternlm.infer.engine import Engine, generate
from ternlm.infer.fast import FastBlock, is_fast, pack, shared
from ternlm.infer.params import SamplingParams
from ternlm.model.decoder import CausalLM, build_model
from ternlm.model.linear import adapt
from ternlm.ops import onednn
from ternlm.ops.attention import make_segment_attend

CPU = torch.device("cpu")
KINDS = {
    "plain": {},
    "biases": {"attention_bias": True},
    "grouped heads": {"num_key_value_heads": 2},
    "norms of queries and keys": {"qk_norm": True, "num_key_value_heads": 2},
    "tied head": {"tie_word_embeddings": True},
}
pytestmark = pytest.mark.skipif(not onednn.is_available(CPU, torch.float32), reason="PyTorch was built without oneDNN")


def made(dtype: torch.dtype = torch.float32, **settings: object) -> CausalLM:
    """A model of random weights, norms and biases too."""
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=160, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=112,
        max_position_embeddings=128, **settings,
    )  # fmt: skip
    model = build_model(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.to(dtype)
    return model


@torch.no_grad()
def logits(model: CausalLM, num: int = 23) -> torch.Tensor:
    tokens = torch.arange(num)[None] * 37 % 160
    attend = make_segment_attend([[num]], CPU)
    return model.lm_head(model(tokens, torch.arange(num)[None], attend))


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_fast_blocks_compute_what_the_models_own_do(settings: dict[str, object]) -> None:
    model = made(**settings)
    expected = logits(model)
    torch.testing.assert_close(logits(shared(model)), expected, rtol=1e-5, atol=1e-5)
    assert not is_fast(model)  # it was left as it is
    assert pack(model) is model
    assert is_fast(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_they_are_no_further_from_float32() -> None:
    exact = logits(made())
    model = made(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        own = (logits(model).float() - exact).norm()
        packed = (logits(pack(model)).float() - exact).norm()
    assert packed < 1.2 * own
    assert packed > 0  # it is bfloat16


def test_shared_blocks_see_what_training_changes() -> None:
    model = made()
    fast = shared(model)
    before = logits(fast)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(logits(fast), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(fast) - before).abs().max() > 0.1


def test_an_engine_reads_the_weights_of_the_model_without_a_copy() -> None:
    model = made()
    engine = Engine(model, 64)
    assert is_fast(engine._model)
    mine = {weight.data_ptr() for weight in model.parameters()}
    block = engine._model.model.layers[0]
    assert {each.weight.data_ptr() for each in (*block._qkv, block._o, *block._gate_up, block._down)} <= mine


def test_packing_frees_the_weights_that_it_replaces() -> None:
    model = made()
    kept = {name for name, _ in pack(model).named_parameters()}
    assert not any("proj" in name for name in kept)
    assert "model.embed_tokens.weight" in kept


@pytest.mark.parametrize("why", ["adapted", "cut", "autocast", "double"])
def test_what_has_no_fast_blocks_stays_as_it_is(why: str) -> None:
    model = made()
    if why == "adapted":
        adapt(model, AdapterConfig(rank=2), torch.float32)
    if why == "cut":
        model.model.layers[1] = torch.nn.Identity()
    if why == "double":
        model.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        assert shared(model) is model
        assert not is_fast(pack(model))


def test_a_packed_model_continues_texts_as_its_weights_do() -> None:
    model = made(num_key_value_heads=2)
    prompts = [[(7 * i * row + i) % 160 for i in range(1, 4 + 3 * row)] for row in range(11)]
    params = SamplingParams(max_new_tokens=20, temperature=0)
    expected = generate(copy.deepcopy(model), prompts, params)
    assert generate(pack(model), prompts, params) == expected
    alone = [generate(model, [prompt], params)[0] for prompt in prompts]
    assert alone == expected


def test_rows_are_computed_in_few_numbers() -> None:
    rounded = [onednn.round_rows(num) for num in range(1, 1025)]
    assert all(num <= to for num, to in enumerate(rounded, 1))
    assert all(to <= max(num + 3, 1.35 * num) for num, to in enumerate(rounded, 1))
    # A code for each of a packed block's four products and the head's, of which 256 are kept (ternlm/__init__.py).
    assert 5 * len(set(rounded[:512])) <= 256
    assert isinstance(pack(made()).model.layers[0], FastBlock)
