import time

import pytest
import torch

from ternlm.monitor import peak


def test_a_cpu_is_measured_within_a_second():
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = peak.device_peak(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - started < 3  # well under 1 on a machine of one's own
    assert 1e-4 < found.tflops < 100
    assert found.source.startswith("measured")


def test_the_size_stops_growing_when_time_runs_out(monkeypatch):
    sizes = set()

    def slow(size, device, dtype):
        sizes.add(size)
        return 0.01 * (size / 256) ** 3

    monkeypatch.setattr(peak, "_best_seconds", slow)
    found = peak.measure_peak(torch.device("cpu"), torch.bfloat16)
    assert sizes == {256, 512}
    assert found.tflops == pytest.approx(2 * 256**3 / 0.01 / 1e12)


def test_the_fastest_size_counts_where_larger_products_are_slower(monkeypatch):
    monkeypatch.setattr(peak, "_best_seconds", lambda size, device, dtype: 1e-4 * (size / 256) ** 4)
    found = peak.measure_peak(torch.device("cpu"), torch.bfloat16)
    assert found.tflops == pytest.approx(2 * 256**3 / 1e-4 / 1e12)
    assert "256 x 256" in found.source


def test_the_size_grows_with_the_speed(monkeypatch):
    monkeypatch.setattr(peak, "_best_seconds", lambda size, device, dtype: 2 * size**3 / (500e12 * size / 8192))
    found = peak.measure_peak(torch.device("cuda"), torch.bfloat16)
    assert "8192 x 8192" in found.source
    assert found.tflops == pytest.approx(500)


@pytest.mark.parametrize(
    ("dtype", "precision", "tflops"),
    [(torch.bfloat16, "highest", 312), (torch.float32, "highest", 19.5), (torch.float32, "high", 156)],
)
def test_a_known_gpu_is_looked_up(monkeypatch, dtype, precision, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    found = peak.device_peak(torch.device("cuda"), dtype)
    assert found.tflops == tflops
    assert "A100" in found.source
