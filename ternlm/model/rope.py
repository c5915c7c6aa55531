"""Rotary positions (arXiv 2104.09864), with linear, dynamic NTK, YaRN and Llama 3.1's scaling.

Half-split rotation, as in Hugging Face's Llama and in InternLM. Shapes: B batch, T tokens, N heads, H head dim.
"""

import math

import torch
from torch import Tensor

from ternlm.config.model import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig, length: int | Tensor, device: torch.device) -> tuple[Tensor, float]:
    """Return the inverse frequencies, float32, and the factor on cos and sin.

    length: of the sequence (tokens) that is to be attended over, or each token's, (B, T); only dynamic scaling depends
    on it. The frequencies are (H/2), or (B, T, H/2) where they depend on each token's.
    """
    head, scaling = config.head_size, config.rope_scaling
    exponents = torch.arange(0, head, 2, dtype=torch.float32, device=device) / head
    theta = _dynamic_theta(config, length) if scaling.kind == "dynamic" else config.rope_theta
    frequencies = 1.0 / theta**exponents
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "yarn":
        return _yarn(config, frequencies)
    if scaling.kind == "llama3":
        return frequencies * llama3_shares(scaling, config.rope_original_length, frequencies), 1.0
    return frequencies, 1.0


def rope_tables(
    config: ModelConfig, positions_BT: Tensor, length: int | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the positions' angles, both (B, T, 1, H); length as for `rope_frequencies`."""
    frequencies, scale = rope_frequencies(config, length, positions_BT.device)
    angles = positions_BT[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head by its position; cos and sin as from `rope_tables`."""
    first, second = x_BTNH.chunk(2, dim=-1)
    return x_BTNH * cos + torch.cat((-second, first), dim=-1) * sin


def llama3_shares(scaling: RopeScaling, trained: int, frequencies: Tensor) -> Tensor:
    """Return what Llama 3.1's scaling multiplies each unscaled frequency with, for `trained` tokens (arXiv 2407.21783).

    Low frequencies are divided by the factor, high ones kept, and those between go evenly from one to the other.
    """
    rotations = trained * frequencies / (2 * math.pi)  # over the trained length
    kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept + (1 - kept) / scaling.factor


def _dynamic_theta(config: ModelConfig, length: int | Tensor) -> float | Tensor:
    """Return the base for sequences of this length: larger beyond the trained one (dynamic NTK), (B, T, 1) or one."""
    head, factor, trained = config.head_size, config.rope_scaling.factor, config.rope_original_length
    if isinstance(length, Tensor):
        stretch = factor * length[..., None].clamp(min=trained).double() / trained - (factor - 1)
        return (config.rope_theta * stretch ** (head / (head - 2))).float()
    return config.rope_theta * (factor * max(length, trained) / trained - (factor - 1)) ** (head / (head - 2))


def _yarn(config: ModelConfig, frequencies: Tensor) -> tuple[Tensor, float]:
    """Interpolate low frequencies and keep high ones (arXiv 2309.00071, section 3.2)."""
    head, scaling, trained = config.head_size, config.rope_scaling, config.rope_original_length

    def dim_of(rotations: float) -> float:
        return head * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dim_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dim_of(scaling.beta_slow)), head - 1)
    index = torch.arange(head // 2, dtype=torch.float32, device=frequencies.device)
    interpolated = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    mixed = frequencies * (1 - interpolated) + frequencies / scaling.factor * interpolated
    scale = scaling.attention_factor
    if scale is None:
        scale = 0.1 * math.log(scaling.factor) + 1.0
    return mixed, scale
