from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ternlm.config.adapter import ALL_TARGETS, AdapterConfig
from ternlm.config.model import ModelConfig
from ternlm.model.decoder import build_model
from ternlm.model.linear import adapt
from ternlm.planner.flops import (
    ancestor_flops_per_token,
    forward_flops,
    matmul_params,
    squared_lengths,
    training_flops,
    training_flops_per_token,
)

TINY = ModelConfig(preset="tiny")
GQA = ModelConfig(preset="tiny-gqa", head_dim=32, tie_word_embeddings=True, qk_norm=True)


@pytest.mark.parametrize(
    ("preset", "recompute", "gflop"),
    [
        ("internlm-7b", False, 44.41),
        ("internlm-7b", True, 58.37),
        ("internlm-20b", False, 123.97),
        ("internlm-20b", True, 164.23),
    ],
)
def test_ancestor_formula_gives_its_published_flops_per_token(preset, recompute, gflop):
    flops = ancestor_flops_per_token(ModelConfig(preset=preset), 2048, recompute)
    assert flops / 1e9 == pytest.approx(gflop, abs=0.01)


@pytest.mark.parametrize("preset", ["internlm-7b", "internlm-20b"])
def test_our_full_convention_is_within_one_percent_of_the_ancestors(preset):
    config = ModelConfig(preset=preset)
    ours = training_flops_per_token(config, 2048, recompute=1.0)
    assert ours.full == pytest.approx(ancestor_flops_per_token(config, 2048, False), rel=0.01)
    assert ours.hardware == pytest.approx(ancestor_flops_per_token(config, 2048, True), rel=0.01)


def test_matmul_params_are_all_params_but_embedding_norms_and_biases():
    config = ModelConfig(preset="internlm-7b")
    hidden, layers = 4096, 32
    norms_and_biases = layers * (2 * hidden + 4 * hidden) + hidden
    assert matmul_params(config) == config.num_params - config.vocab_size * hidden - norms_and_biases


def test_full_attention_is_the_6n_plus_12_l_d_s_of_the_literature():
    config = ModelConfig(preset="internlm-7b")
    flops = training_flops_per_token(config, 2048)
    assert flops.full == 6 * matmul_params(config) + 12 * 32 * 4096 * 2048
    assert flops.full - flops.causal == 6 * 32 * 4096 * 2048
    assert flops.hardware == flops.full


def test_recompute_adds_the_forward_of_whole_blocks_only():
    config = ModelConfig(preset="internlm-7b")
    forward = forward_flops(config, tokens=2048, pairs=2048**2).full
    head = 2 * config.vocab_size * config.hidden_size * 2048
    none, third, every = (training_flops(config, 2048, 2048**2, share) for share in (0, 1 / 3, 1))
    assert every.hardware - none.hardware == forward - head
    assert third.hardware - none.hardware == pytest.approx((forward - head) * 11 / 32)
    assert none.full == third.full == every.full


def test_squared_lengths_sums_over_rows_and_segments():
    assert squared_lengths([(3, 1), (4,)]) == 9 + 1 + 16


def count(model, segments):
    """Return the operations of a forward and of a backward pass of the real model, as torch counts them."""
    torch.set_num_threads(1)
    T, bounds = sum(segments), [sum(segments[:i]) for i in range(len(segments) + 1)]

    def attend(q, k, v, layer):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        with sdpa_kernel(SDPBackend.MATH):
            parts = [
                F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True)
                for a, b in pairwise(bounds)
            ]
        return torch.cat(parts, dim=2).transpose(1, 2)

    positions = torch.cat([torch.arange(n) for n in segments])[None]
    with FlopCounterMode(display=False) as forward:
        logits = model.lm_head(model(torch.zeros(1, T, dtype=torch.long), positions, attend))
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("config", [TINY, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("segments", [(64,), (40, 16, 8)], ids=["one document", "packed"])
def test_counts_equal_what_torch_counts_on_the_real_model(config, segments):
    forward, backward = count(build_model(config), segments)
    tokens, pairs = sum(segments), squared_lengths([segments])
    assert forward == forward_flops(config, tokens, pairs).full
    assert forward + backward == training_flops(config, tokens, pairs).full


@pytest.mark.parametrize("config", [TINY, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize(
    "targets",
    [ALL_TARGETS, ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)],
    ids=lambda targets: " ".join(targets) if targets != ALL_TARGETS else "all",
)
def test_a_run_of_adapters_counts_what_torch_counts_on_the_real_model(config, targets):
    adapter, segments = AdapterConfig(rank=8, targets=targets), (40, 24)
    model = build_model(config)
    adapt(model, adapter, torch.float32)
    pairs = squared_lengths([segments])
    counted = training_flops(config, 64, pairs, adapter=adapter)
    assert sum(count(model, segments)) == counted.full
    assert counted.full < training_flops(config, 64, pairs).full


def test_recomputed_adapters_run_again_with_their_blocks():
    adapter = AdapterConfig(rank=8)
    none, every = (training_flops(TINY, 64, 64**2, share, adapter) for share in (0, 1))
    model = build_model(TINY)
    adapt(model, adapter, torch.float32)
    head = 2 * TINY.vocab_size * TINY.hidden_size * 64
    assert every.hardware - none.hardware == count(model, (64,))[0] - head
    assert none.full == none.hardware == every.full


def test_doras_lengths_of_rows_are_not_counted():
    lora, dora = (training_flops(TINY, 64, 64**2, adapter=AdapterConfig(kind=kind)) for kind in ("lora", "dora"))
    assert lora == dora
