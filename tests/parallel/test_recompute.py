import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError
from ternlm.config.training import ComputeConfig, recomputed_blocks
from ternlm.model.decoder import build_model
from ternlm.model.init import init_weights
from ternlm.ops.attention import make_segment_attend
from ternlm.parallel import apply
from ternlm.parallel.apply import prepare_blocks, wants_compile

CPU = torch.device("cpu")
CONFIG = ModelConfig(preset="tiny-gqa", attention_bias=True)
LENGTHS = [[10, 22], [32]]


def gradients(compute, lengths=LENGTHS):
    model = build_model(CONFIG)
    init_weights(model, CONFIG, 1)
    names = [name for name, _ in model.named_parameters()]
    prepare_blocks(list(model.model.layers), compute, wants_compile(compute, CPU))
    assert [name for name, _ in model.named_parameters()] == names
    tokens = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens, positions, make_segment_attend(lengths, CPU))
        hidden.square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None], counter.get_total_flops()


def test_a_fraction_is_rounded_up_to_whole_blocks():
    fractions = (0.0, 0.01, 0.1, 0.11, 1.0)
    assert [recomputed_blocks(30, fraction) for fraction in fractions] == [0, 1, 3, 4, 30]
    assert [recomputed_blocks(2, fraction) for fraction in (0.4, 0.5, 0.6)] == [1, 1, 2]


@pytest.mark.parametrize("keep", ["nothing", "matmuls"])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_recomputed_gradients_are_the_same_bit_for_bit(keep, fraction):
    plain, _ = gradients(ComputeConfig(compile="off"))
    again, _ = gradients(ComputeConfig(compile="off", recompute=fraction, recompute_keep=keep))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recompute_repeats_the_chosen_blocks_and_keeping_matmuls_repeats_none():
    _, plain = gradients(ComputeConfig(compile="off"))
    _, half = gradients(ComputeConfig(compile="off", recompute=0.5))
    _, whole = gradients(ComputeConfig(compile="off", recompute=1.0))
    _, kept = gradients(ComputeConfig(compile="off", recompute=1.0, recompute_keep="matmuls"))
    assert plain < half < whole
    assert half - plain == whole - half
    assert kept == plain


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "keep"), [(0.0, "nothing"), (1.0, "nothing"), (1.0, "matmuls")])
def test_compiled_blocks_give_the_same_gradients(recompute, keep):
    plain, _ = gradients(ComputeConfig(compile="off"))
    compute = ComputeConfig(compile="on", recompute=recompute, recompute_keep=keep)
    for lengths in (LENGTHS, [[32], [1, 2, 29]], LENGTHS):
        compiled, _ = gradients(compute, lengths)
    for a, b in zip(plain, compiled, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-9


def test_compile_without_a_compiler_is_refused_when_asked_for_and_left_out_by_default(monkeypatch):
    monkeypatch.setattr(apply.shutil, "which", lambda name: None)
    assert not wants_compile(ComputeConfig(), CPU)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler .* set compute\.compile=off"):
        wants_compile(ComputeConfig(compile="on"), CPU)
