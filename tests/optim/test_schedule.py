import math

import pytest
import torch

from ternlm.config.training import OptimizerConfig, ScheduleConfig
from ternlm.optim.schedule import apply_schedule, beta2_at, lr_factor


def test_internlm_schedule_follows_the_ancestors_formula():
    total, warmup, peak, floor = 1000, 10, 1e-4, 1e-5
    schedule = ScheduleConfig(kind="cosine", warmup_fraction=0.01, min_lr=0.1)
    for t in (0, 5, 9, 10, 11, 500, 999):
        if t < warmup:
            expected = peak * (t + 1) / warmup
        else:
            expected = floor + (peak - floor) * (1 + math.cos(math.pi * (t - warmup) / (total - warmup))) / 2
        assert peak * lr_factor(t, total, schedule) == pytest.approx(expected, rel=1e-12)


def test_wsd_is_flat_and_then_falls_to_the_minimum():
    schedule = ScheduleConfig(kind="wsd", warmup_fraction=0.1, decay_fraction=0.2, min_lr=0.5)
    factors = [lr_factor(t, 100, schedule) for t in range(101)]
    assert factors[0] == 0.1
    assert factors[9:81] == [1.0] * 72
    assert factors[90] == pytest.approx(0.75)
    assert factors[100] == 0.5


def test_constant_never_falls():
    schedule = ScheduleConfig(kind="constant", warmup_fraction=0.0)
    assert {lr_factor(t, 50, schedule) for t in range(50)} == {1.0}


def test_beta2_rises_by_the_ancestors_formula_from_its_start():
    config = OptimizerConfig(betas=(0.9, 0.95), beta2_ramp=0.8)
    assert beta2_at(0, config) == 0.95
    assert beta2_at(10000, config) == pytest.approx(1 - 10000**-0.8)
    assert beta2_at(9999, OptimizerConfig(betas=(0.9, 0.95))) == 0.95


def test_every_group_gets_its_own_peak_times_the_factor():
    optimizer = torch.optim.AdamW(
        [
            {"params": [torch.nn.Parameter(torch.ones(1))], "peak_lr": 1.0},
            {"params": [torch.nn.Parameter(torch.ones(1))], "peak_lr": 0.5},
        ]
    )
    schedule = ScheduleConfig(kind="wsd", warmup_fraction=0.5)
    assert apply_schedule([optimizer], 0, 20, OptimizerConfig(beta2_ramp=0.5), schedule) == 0.1
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
