"""benchmarks/train_gpu: how kernels are sorted, and a tiny run on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "train_gpu"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("triton_poi_fused_mul_silu_0", "compiled blocks, without matrix products"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer and clipping"),
        ("Memcpy DtoH (Device -> Pinned)", "copies and fills"),
        ("void at::native::vectorized_elementwise_kernel<4, ExpFunctor>", "uncompiled elementwise"),
        ("ncclDevKernel_Generic", "other"),
    ],
)
def test_a_kernel_is_sorted_by_its_name(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from breakdown import kind_of

    assert kind_of(name).startswith(kind)


@pytest.mark.slow
def test_a_tiny_run_on_the_cpu_reports_mfu_and_a_profile(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--out", str(tmp_path), "--device", "cpu", "--preset", "tiny"]
    options = "--layers 2 --dtype float32 --seq-len 64 --microbatch 2 --accumulate 2 --compile off --warmup 1"
    subprocess.run([*command, *options.split(), "--steps", "2", "--profiled", "1"], check=True)
    result = json.loads((tmp_path / "train_gpu.json").read_text())
    assert 0 < result["mfu_causal"] < result["mfu_full"] < 1
    assert result["profile"]["kinds_ms"]["matrix products"] > 0
    assert result["profile"]["regions_ms"]["head and loss"] > 0
    assert "Where the time goes" in (tmp_path / "train_gpu.md").read_text()
