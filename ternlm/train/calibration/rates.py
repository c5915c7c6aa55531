"""Times one device's kernels and turns them into the planner's `Rates`: what each figure was made of stays with it.

Collectives are links.py's business, the file cluster_file.py's.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ternlm.config import Config, config_from_dict
from ternlm.config.layout import Layout
from ternlm.config.model import ModelConfig
from ternlm.config.training import ComputeConfig
from ternlm.parallel.apply import wants_compile
from ternlm.planner.cluster import Rates
from ternlm.planner.kernels import Kernels
from ternlm.planner.work import step_work
from ternlm.train.calibration.clock import Clock
from ternlm.train.calibration.fit import fit_attention, fit_matmuls, solve_stream
from ternlm.train.calibration.kernels import (
    BlockWork,
    Sizes,
    attention_works,
    block_work,
    loss_works,
    matmul_works,
    stream_works,
    update_work,
)

logger = logging.getLogger(__name__)

LOSS_TOKENS = 512
TINY_BLOCK = 16, 64
"""Tokens and width of a block that is all launches."""


@dataclass(frozen=True)
class DeviceFigures:
    """What one device was found to do."""

    rates: Rates
    largest_tflops: float
    """Of the fastest product: what MFU is measured against where no data sheet says more."""
    how: Mapping[str, str]
    """By the rate's name: what it was measured on."""
    disturbance: float
    """Share of samples during which another process took the processor."""

    def typical(self, others: Sequence["DeviceFigures"]) -> "DeviceFigures":
        """Return these figures with each rate the median over all devices."""
        alike = [self, *others]
        middle = {
            name: sorted(getattr(one.rates, name) for one in alike)[len(alike) // 2] for name in Rates.model_fields
        }
        peaks = sorted(one.largest_tflops for one in alike)
        worst = max(one.disturbance for one in alike)
        return DeviceFigures(Rates(**middle), peaks[len(alike) // 2], self.how, worst)


def measure_device(device: torch.device, dtype: torch.dtype, sizes: Sizes, seconds: float) -> DeviceFigures:
    """Time products, attention, memory, optimizer, a block and the loss on one device, for about `seconds`.

    The block is compiled where training's would be, which takes some of the time.
    """
    clock, measured = Clock(device), _Measured({}, {})
    _measure_products(clock, sizes, dtype, 0.4 * seconds, measured)
    _measure_attention(clock, sizes, dtype, 0.15 * seconds, measured)
    _measure_memory(clock, sizes, 0.1 * seconds, measured)
    _measure_block(clock, sizes, dtype, 0.15 * seconds, measured)
    _measure_loss(clock, sizes, dtype, 0.1 * seconds, measured)
    largest = measured.values.pop("largest")
    return DeviceFigures(Rates(**measured.values), largest, measured.how, clock.disturbance)


@dataclass
class _Measured:
    values: dict[str, float]
    how: dict[str, str]

    def add(self, name: str, value: float, how: str) -> None:
        self.values[name], self.how[name] = value, how


def _measure_products(clock: Clock, sizes: Sizes, dtype: torch.dtype, seconds: float, measured: _Measured) -> None:
    works = matmul_works(sizes, clock.device, dtype)
    times = clock.measure({name: work for name, (_, work) in works.items()}, seconds, cold=True)
    timed = [(one, times[name]) for name, (one, _) in works.items()]
    curve = fit_matmuls(timed)
    how = (
        f"{len(timed)} products of {min(sizes.tokens)} to {max(sizes.tokens)} tokens, widths {min(sizes.widths)} to "
        f"{11 * max(sizes.widths) // 4}, forward and backward; median error of the curve {curve.error:.1%}"
    )
    (tflops,), (half_inner, half_outer, per_element) = curve.tflops, curve.halves
    operands = tflops * 1e3 / per_element if per_element else 0.0
    figures = {"matmul_tflops": tflops, "half_inner": half_inner, "half_outer": half_outer, "operands_g_s": operands}
    for name, value in figures.items():
        measured.add(name, value, how)
    measured.values["largest"] = max(one.flops / took for one, took in timed) * 1e-12


def _measure_attention(clock: Clock, sizes: Sizes, dtype: torch.dtype, seconds: float, measured: _Measured) -> None:
    works = attention_works(sizes, clock.device, dtype)
    both = {f"{name} {way}": getattr(work, way) for name, work in works.items() for way in ("forward", "backward")}
    times = clock.measure(both, seconds)
    timed = [
        (work.flops, work.document, times[f"{name} forward"], times[f"{name} backward"]) for name, work in works.items()
    ]
    curve = fit_attention(timed)
    how = (
        f"documents of {min(sizes.documents)} to {max(sizes.documents)} tokens, heads of "
        f"{' and '.join(str(size) for _, size in sizes.heads)}; median error of the curve {curve.error:.1%}"
    )
    values = dict(zip(("attention_tflops", "attention_backward_tflops"), curve.tflops, strict=True))
    halves = dict(zip(("half_attention", "attention_block"), curve.halves, strict=True))
    for name, value in (values | halves).items():
        measured.add(name, value, how)


def _measure_memory(clock: Clock, sizes: Sizes, seconds: float, measured: _Measured) -> None:
    times = clock.measure({**stream_works(sizes, clock.device), "update": update_work(sizes, clock.device)}, seconds)
    size, mib = sizes.stream_bytes, sizes.stream_bytes // 2**20
    measured.add("memory_gb_s", 2e-9 * size / times["copy"], f"copy of {mib} MiB, bytes read and written")
    moved = 40.0 * sizes.parameters
    how = f"norm, clipping and fused AdamW of {sizes.parameters / 1e6:.3g}M parameters, 40 bytes each"
    measured.add("update_gb_s", 1e-9 * moved / times["update"], how)
    if clock.device.type == "cpu":
        extra = max(times["write anew"] - times["write"], 1e-3 * times["write"])
        how = f"{mib} MiB written in new memory, over the same in place: page faults"
        measured.add("fresh_gb_s", 1e-9 * size / extra, how)


def _measure_block(clock: Clock, sizes: Sizes, dtype: torch.dtype, seconds: float, measured: _Measured) -> None:
    compute = ComputeConfig(device=clock.device.type)
    compiled = wants_compile(compute, clock.device)
    # Each of the two blocks is compiled for its own sizes, as training's are.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        tiny, large = (block_work(*size, compute, compiled, clock.device, dtype) for size in (TINY_BLOCK, sizes.block))
        named = {"tiny": tiny, "large": large}
        works = {f"{name} {part}": work for name, block in named.items() for part, work in block.works.items()}
        times = clock.measure(works, seconds)
    rows = {}
    for name, block in named.items():
        beside = sum(times[f"{name} {part}"] for part in ("products", "attention"))
        kernels = _block_kernels(block, dtype)
        left = max(times[f"{name} both"] - beside, 0.0)
        rows[name] = left, sum(k.stream_bytes for k in kernels), sum(k.launches for k in kernels)
    gb_s, each_us = solve_stream(rows["large"], rows["tiny"])
    state = "compiled" if compiled else "uncompiled"
    how = f"a {state} block of {sizes.block[0]} tokens and width {sizes.block[1]}, its products and attention taken off"
    measured.add("norms_gb_s", gb_s, how)
    how = f"a {state} block of {TINY_BLOCK[0]} tokens and width {TINY_BLOCK[1]}, for each of its kernels"
    measured.add("serial_us" if clock.device.type == "cpu" else "launch_us", each_us, how)


def _block_kernels(block: BlockWork, dtype: torch.dtype) -> tuple[Kernels, Kernels]:
    """Return what the planner takes such a block for, forward and backward."""
    work = step_work(_config(block.config, block.tokens, dtype, block.compiled), Layout(1))
    return work.forward, work.backward


def _config(model: ModelConfig, tokens: int, dtype: torch.dtype, compiled: bool) -> Config:
    return config_from_dict(
        {
            "model": model.model_dump(exclude_none=True),
            "data": {"seq_len": tokens, "sources": [{"name": "none", "path": "-"}]},
            "batch": {"global_sequences": 1},
            "train": {"steps": 1},
            "compute": {"dtype": str(dtype).removeprefix("torch."), "compile": "on" if compiled else "off"},
        }
    )


def _measure_loss(clock: Clock, sizes: Sizes, dtype: torch.dtype, seconds: float, measured: _Measured) -> None:
    times = clock.measure(loss_works(sizes, LOSS_TOKENS, clock.device, dtype), seconds)
    width = 2 * sizes.block[1]
    model = ModelConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=width,
        max_position_embeddings=LOSS_TOKENS,
    )
    (stage,) = step_work(_config(model, LOSS_TOKENS, dtype, False), Layout(1)).stages
    moved = stage.ends_forward.loss_bytes + stage.ends_backward.loss_bytes
    left = max(times["whole"] - times["products"], 1e-3 * times["whole"])
    how = f"loss of {LOSS_TOKENS} tokens over {sizes.vocabulary} with its gradients, the three products taken off"
    measured.add("loss_gb_s", 1e-9 * moved / left, how)


def slowest(figures: Sequence[DeviceFigures], tolerance: float = 0.1) -> list[int]:
    """Return the ranks whose products are slower than the median's by more than `tolerance`."""
    rates = [one.rates.matmul_tflops for one in figures]
    middle = sorted(rates)[len(rates) // 2]
    return [rank for rank, rate in enumerate(rates) if rate < (1 - tolerance) * middle]
