import json
import math

import pytest

from ternlm.config.training import TrainConfig
from ternlm.monitor.health import SpikeRule


def rule(spike="skip", ratio=1.5, window=3):
    return SpikeRule(TrainConfig(steps=10, spike=spike, spike_ratio=ratio, spike_window=window))


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_loss_above_the_ratio_of_the_mean_is_a_spike(action):
    spikes = rule(action)
    assert [spikes.judge(loss) for loss in (1.0, 2.0, 3.0)] == ["ok"] * 3
    assert spikes.judge(3.0) == "ok"  # the limit itself: 1.5 times the mean of 2
    assert spikes.judge(4.1) == action  # the mean is now that of 2, 3 and 3


def test_no_spike_is_seen_before_the_window_is_full():
    spikes = rule()
    assert [spikes.judge(loss) for loss in (1.0, 100.0, 1.0)] == ["ok"] * 3


def test_a_spike_does_not_enter_the_mean():
    spikes = rule()
    verdicts = [spikes.judge(loss) for loss in (1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 1.0)]
    assert verdicts == ["ok"] * 3 + ["skip"] * 4 + ["ok"]


def test_off_sees_nothing():
    spikes = SpikeRule(TrainConfig(steps=10))
    assert {spikes.judge(loss) for loss in (1.0, 1.0, 1.0, 1e9)} == {"ok"}


def test_a_loss_that_is_not_finite_is_left_to_the_gradient_check():
    spikes = rule()
    verdicts = [spikes.judge(loss) for loss in (1.0, 1.0, math.nan, math.inf, 1.0, math.nan, 2.0)]
    assert verdicts == ["ok"] * 6 + ["skip"]


def test_a_resumed_rule_judges_as_the_uninterrupted_one():
    losses = [2.0, 1.9, 2.1, 1.8, 5.0, 1.7, 2.9]
    whole, first, second = rule(), rule(), rule()
    expected = [whole.judge(loss) for loss in losses]
    before = [first.judge(loss) for loss in losses[:4]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.judge(loss) for loss in losses[4:]] == expected
    assert "skip" in expected[4:]


def test_a_shorter_window_keeps_the_newest_losses():
    spikes = rule(window=2)
    spikes.load_state_dict({"losses": [9.0, 9.0, 1.0, 1.0]})
    assert spikes.judge(1.6) == "skip"
