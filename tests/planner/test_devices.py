import pytest

from ternlm.planner.devices import PEAKS, peak_tflops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H800", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_bfloat16_peak_is_found_by_the_name_torch_gives(name, tflops):
    assert peak_tflops(name, "bfloat16") == tflops


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Quadro RTX 6000",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    ],
)
def test_another_product_or_a_slice_of_one_is_not_in_the_table(name):
    assert peak_tflops(name, "bfloat16") is None


def test_a_format_without_hardware_has_no_peak():
    assert peak_tflops("Tesla V100-SXM2-32GB", "bfloat16") is None
    assert peak_tflops("Tesla V100-SXM2-32GB", "float16") == 125
    assert peak_tflops("Tesla V100-PCIE-16GB", "float16") == 112


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="int4"):
        peak_tflops("NVIDIA H100 PCIe", "int4")


def test_no_wider_format_is_faster():
    for peak in PEAKS.values():
        assert peak.float16 >= peak.tf32
        assert peak.float16 >= peak.float32 > 0
