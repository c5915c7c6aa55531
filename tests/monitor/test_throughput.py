import pytest

from ternlm.monitor.names import find_metric
from ternlm.monitor.throughput import Throughput
from ternlm.planner.flops import Flops

FLOPS = Flops(full=4e12, causal=3e12, hardware=6e12)


def test_windows_are_the_last_1_10_and_50_steps():
    speed = Throughput(total_steps=100)
    for step in range(60):
        speed.record(tokens=100, seconds=1.0 if step < 50 else 2.0, flops=FLOPS)
    speed.record(tokens=100, seconds=4.0, flops=FLOPS)
    metrics = speed.metrics(step=61, elapsed_seconds=74.0)
    assert metrics["speed/tokens_per_s"] == pytest.approx(100 / 4)
    assert metrics["speed/tokens_per_s_10"] == pytest.approx(1000 / (9 * 2 + 4))
    assert metrics["speed/tokens_per_s_50"] == pytest.approx(5000 / (39 * 1 + 10 * 2 + 4))


def test_speeds_are_those_of_one_device():
    speed = Throughput(total_steps=10, num_devices=4, peak_tflops=2.0)
    speed.record(tokens=800, seconds=2.0, flops=FLOPS)
    metrics = speed.metrics(step=1, elapsed_seconds=2.0)
    assert metrics["speed/tokens_per_s"] == 100
    assert metrics["speed/tflops_full"] == 0.5
    assert metrics["speed/tflops_causal"] == 0.375
    assert metrics["speed/tflops_hardware"] == 0.75
    assert metrics["speed/mfu_full"] == 0.25
    assert metrics["speed/mfu_causal"] == 0.1875
    assert metrics["speed/mfu_hardware"] == 0.375


def test_mfu_is_left_out_where_the_peak_is_unknown():
    speed = Throughput(total_steps=10)
    speed.record(tokens=1, seconds=1.0, flops=FLOPS)
    assert not [name for name in speed.metrics(1, 1.0) if "mfu" in name]


def test_waiting_is_that_of_the_last_step_and_its_share_of_the_window():
    speed = Throughput(total_steps=10)
    speed.record(1, seconds=1.0, flops=FLOPS, wait_seconds=0.5)
    speed.record(1, seconds=3.0, flops=FLOPS, wait_seconds=0.1)
    metrics = speed.metrics(2, 4.0)
    assert metrics["data/wait_ms"] == pytest.approx(100)
    assert metrics["data/wait_share"] == pytest.approx(0.6 / 4)


def test_eta_leaves_out_the_first_step_which_compiles():
    speed = Throughput(total_steps=10)
    speed.record(1, seconds=60.0, flops=FLOPS)
    assert speed.metrics(1, 60.0)["time/eta_s"] == 9 * 60
    speed.record(1, seconds=2.0, flops=FLOPS)
    speed.record(1, seconds=4.0, flops=FLOPS)
    assert speed.metrics(3, 66.0)["time/eta_s"] == 7 * 3


@pytest.mark.parametrize("recorded", [49, 50, 51])
def test_eta_leaves_out_the_first_step_as_long_as_the_window_holds_it(recorded):
    speed = Throughput(total_steps=100)
    speed.record(1, seconds=600.0, flops=FLOPS)
    for _ in range(recorded - 1):
        speed.record(1, seconds=2.0, flops=FLOPS)
    assert speed.metrics(recorded, 0.0)["time/eta_s"] == pytest.approx((100 - recorded) * 2)


def test_eta_is_never_past_the_time_budget():
    speed = Throughput(total_steps=1000, max_seconds=100.0)
    speed.record(1, seconds=1.0, flops=FLOPS)
    assert speed.metrics(1, 30.0)["time/eta_s"] == 70
    assert speed.metrics(1, 130.0)["time/eta_s"] == 0


def test_every_metric_is_in_the_catalogue():
    speed = Throughput(total_steps=10, peak_tflops=1.0)
    speed.record(1, seconds=1.0, flops=FLOPS)
    assert all(find_metric(name) for name in speed.metrics(1, 1.0))


def test_a_step_without_duration_is_refused():
    with pytest.raises(ValueError, match="seconds"):
        Throughput(total_steps=1).record(1, seconds=0.0, flops=FLOPS)
