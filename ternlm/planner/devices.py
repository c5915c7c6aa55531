"""Peak throughput of accelerators by the name PyTorch gives them, from their makers' data sheets.

Dense figures (no structured sparsity) with float32 accumulation, as PyTorch's matrix products have; on
GeForce cards that is half of what is advertised. What isn't here, or is only a slice of a device, is for the
caller to measure (`ternlm.monitor.peak`). No torch here.
"""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Dense TFLOPS by number format; 0 where the device has no hardware for it."""

    bfloat16: float
    float16: float
    tf32: float
    float32: float


# Keys: words of `torch.cuda.get_device_name()` that must all be there; the longest key that fits wins.
PEAKS: dict[str, Peak] = {
    # NVIDIA HGX B200 and B300 (an eighth of the board) and GB200 (half of the superchip) data sheets, divided
    # by 2 for sparsity.
    "B200": Peak(2250, 2250, 1125, 75),
    "B300": Peak(2250, 2250, 1125, 75),
    "GB200": Peak(2500, 2500, 1250, 80),
    # NVIDIA H100 data sheet (SXM, PCIe, NVL), divided by 2 for sparsity. The H800 differs in NVLink and
    # float64, the GH200 in its host.
    "H100": Peak(989.4, 989.4, 494.7, 66.9),
    "H100 PCIe": Peak(756.5, 756.5, 378, 51.2),
    "H100 NVL": Peak(835.5, 835.5, 417.5, 60),
    "H800": Peak(989.4, 989.4, 494.7, 66.9),
    "H800 PCIe": Peak(756.5, 756.5, 378, 51.2),
    "GH200": Peak(989.4, 989.4, 494.7, 66.9),
    # NVIDIA H200 data sheet (SXM, NVL), divided by 2 for sparsity.
    "H200": Peak(989.4, 989.4, 494.7, 66.9),
    "H200 NVL": Peak(835.5, 835.5, 417.5, 60),
    # NVIDIA H20 data sheet.
    "H20": Peak(148, 148, 74, 44),
    # NVIDIA A100 data sheet, SXM and PCIe alike. The A800 differs in NVLink only.
    "A100": Peak(312, 312, 156, 19.5),
    "A800": Peak(312, 312, 156, 19.5),
    # NVIDIA A30, A40, A10 data sheets; AWS's A10G is a slower A10 (NVIDIA A10G data sheet).
    "A30": Peak(165, 165, 82, 10.3),
    "A40": Peak(149.7, 149.7, 74.8, 37.4),
    "A10": Peak(125, 125, 62.5, 31.2),
    "A10G": Peak(70, 70, 35, 35),
    # NVIDIA L40S, L40, L4 data sheets.
    "L40S": Peak(362.05, 362.05, 183, 91.6),
    "L40": Peak(181.05, 181.05, 90.5, 90.5),
    "L4": Peak(121, 121, 60, 30.3),
    # NVIDIA RTX A6000 in the Ampere GA102 whitepaper; RTX 6000 Ada in the Ada professional whitepaper.
    "RTX A6000": Peak(154.8, 154.8, 77.4, 38.7),
    "RTX 6000 Ada": Peak(364.2, 364.2, 182.1, 91.1),
    # Whitepapers, appendix A, rows "with FP32 accumulate": Ampere GA102, Ada, RTX Blackwell.
    "RTX 3090": Peak(71, 71, 35.6, 35.6),
    "RTX 3090 Ti": Peak(80, 80, 40, 40),
    "RTX 4090": Peak(165.2, 165.2, 82.6, 82.6),
    "RTX 5090": Peak(209.5, 209.5, 104.8, 104.8),
    # NVIDIA V100 and V100S data sheet, T4 data sheet. No bfloat16, no TF32.
    "V100 SXM2": Peak(0, 125, 0, 15.7),
    "V100 SXM3": Peak(0, 125, 0, 15.7),
    "V100 PCIE": Peak(0, 112, 0, 14),
    "V100S PCIE": Peak(0, 130, 0, 16.4),
    "T4": Peak(0, 65, 0, 8.1),
    # AMD Instinct data sheets, matrix cores; an MI250X is two devices to PyTorch.
    "MI300X": Peak(1307.4, 1307.4, 653.7, 163.4),
    "MI250X": Peak(191.5, 191.5, 0, 47.9),
}

# Words that make another product of a name: an entry fits only if it has them too.
_VARIANTS = frozenset({"mig", "laptop", "mobile", "max", "ti", "super", "d", "nvl"})


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Return the data sheet's dense peak (TFLOPS), or None where the table doesn't know it.

    device_name: as `torch.cuda.get_device_name()` gives it. dtype: bfloat16, float16, tf32 or float32.
    """
    if dtype not in Peak._fields:
        raise ValueError(f"dtype = {dtype!r} is not one of {', '.join(Peak._fields)}")
    words = _words(device_name)
    fits = [key for key in PEAKS if _words(key) <= words and not (words - _words(key)) & _VARIANTS]
    if not fits:
        return None
    best = max(fits, key=lambda key: len(_words(key)))
    figures: dict[str, float] = PEAKS[best]._asdict()
    return figures[dtype] or None


def _words(name: str) -> frozenset[str]:
    return frozenset(re.split(r"[\s\-_/]+", name.lower()))
