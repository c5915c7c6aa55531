"""Scaled rotary positions in GGUF, both ways.

Linear and YaRN's are metadata. Llama 3.1's is a tensor of what each frequency is divided by, as llama.cpp's converter
writes it; our files also say by which settings, and from others these are found again.
"""

import math
from typing import Any

import numpy as np
import torch

from ternlm.config.model import ModelConfig, RopeScaling
from ternlm.convert.gguf_file import GgufFile
from ternlm.convert.weights import ConvertError
from ternlm.model.rope import llama3_shares

ROPE_FACTORS = "rope_freqs.weight"
_OWN = "ternlm.rope_scaling."
_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor")
_TRAINED = "original_max_position_embeddings"


def write_scaling(gguf: Any, writer: Any, config: ModelConfig) -> None:
    """Write the metadata of scaled positions; `rope_factors` go beside."""
    scaling = config.rope_scaling
    if scaling.kind == "llama3":
        for name in _NUMBERS:
            writer.add_float64(_OWN + name, getattr(scaling, name))
        if scaling.original_max_position_embeddings:
            writer.add_uint32(_OWN + _TRAINED, scaling.original_max_position_embeddings)
        return
    if scaling.kind == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_length)
        if scaling.attention_factor is not None:  # there it is a factor on the usual one
            usual = 0.1 * math.log(scaling.factor) + 1
            writer.add_rope_scaling_attn_factors(scaling.attention_factor / usual)


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """Return what each frequency is divided by, float32 (head size / 2), where the scaling is Llama 3.1's."""
    if config.rope_scaling.kind != "llama3":
        return None
    return _factors(config.rope_scaling, config.rope_original_length, config.head_size, config.rope_theta)


def read_scaling(file: GgufFile, head: int, context: int) -> RopeScaling:
    """Return how a file's positions are scaled. head: size of one; context: longest sequence (tokens).

    Raises ConvertError for a scaling that this decoder hasn't.
    """
    architecture = file.metadata["general.architecture"]
    prefix = f"{architecture}.rope.scaling."
    told = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    factor = decimal(told.get("factor") or file.metadata.get(f"{architecture}.rope.scale_linear") or 1.0)
    kind = told.get("type", "none" if factor == 1 else "linear")
    if ROPE_FACTORS in file.tensors:
        if architecture != "llama" or not (kind == "none" or (kind == "linear" and factor == 1)):
            raise ConvertError(
                f"{file.path}: {ROPE_FACTORS} in the architecture {architecture} with rope scaling {kind!r} isn't "
                "supported; llama's without another scaling is"
            )
        return _read_llama3(file, head, context)
    if kind == "none" or (kind == "linear" and factor == 1):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    odd = told.get("yarn_log_multiplier", 0) != 0 or told.get("yarn_ext_factor", 1) != 1
    if kind != "yarn" or odd:
        raise ConvertError(
            f"{file.path}: rope scaling {kind!r} isn't supported like this ({told}); linear and yarn are"
        )
    original = int(told.get("original_context_length", context))
    stretch = told.get("attn_factor", 1.0)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=None if original == context else original,
        beta_fast=decimal(told.get("yarn_beta_fast", 32.0)),
        beta_slow=decimal(told.get("yarn_beta_slow", 1.0)),
        attention_factor=None if stretch == 1 else decimal(stretch * (0.1 * math.log(factor) + 1)),
    )


def decimal(value: float) -> float:
    """Return the number that was meant by a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _read_llama3(file: GgufFile, head: int, context: int) -> RopeScaling:
    place = file.tensors[ROPE_FACTORS]
    factors = file.read(ROPE_FACTORS).double().numpy() if place.shape == (head // 2,) else np.zeros(1)
    theta = decimal(file.metadata.get("llama.rope.freq_base", 10000.0))
    if not (np.isfinite(factors).all() and (factors >= 1).all()):
        raise ConvertError(
            f"{file.path}: {ROPE_FACTORS} of {place.shape} must be {head // 2} numbers from 1, one for each frequency "
            "of a head; fetch the file again"
        )
    own = {name: file.metadata[_OWN + name] for name in (*_NUMBERS, _TRAINED) if _OWN + name in file.metadata}
    guesses = [RopeScaling(kind="llama3", **own)] if own else _guess_llama3(factors, head, theta)
    if (factors == 1).all():
        guesses.append(RopeScaling())
    for scaling in guesses:
        trained = scaling.original_max_position_embeddings or context
        if np.allclose(_factors(scaling, trained, head, theta), factors, rtol=1e-5, atol=0):
            return scaling
    raise ConvertError(
        f"{file.path}: {ROPE_FACTORS} isn't what Llama 3.1's scaling makes of any trained length, and other factors on "
        "frequencies aren't supported; take the model's Hugging Face folder"
    )


def _guess_llama3(factors: np.ndarray, head: int, theta: float) -> list[RopeScaling]:
    """Return the settings from which the factors may come: those of all Llamas so far, and any high_freq_factor.

    Multiplied alike, the trained length and both bounds give the same factors; so low_freq_factor is 1.
    """
    largest = float(factors.max())
    if largest == 1:
        return []
    rotations = _frequencies(head, theta).double().numpy() / (2 * math.pi)  # of each frequency, over a token
    kept = (1 / factors - 1 / largest) / (1 - 1 / largest)
    between = (kept > 1e-4) & (kept < 1 - 1e-4)
    bounds = [4.0]
    if between.sum() > 1:
        _, offset = np.polyfit(rotations[between], kept[between], 1)
        if offset < 0:
            bounds.append(round(1 - 1 / float(offset), 3))
    guesses = []
    for high in bounds:
        if between.any():
            lengths = (kept[between] * (high - 1) + 1) / rotations[between]
        else:  # any length will do that keeps the last kept frequency, and divides the first divided one
            lengths = np.sqrt(high / rotations[kept >= 0.5][-1:] / rotations[kept < 0.5][:1])
        if len(lengths) and high > 1:
            trained = max(1, round(float(np.median(lengths))))
            guesses.append(
                RopeScaling(
                    kind="llama3", factor=largest, high_freq_factor=high, original_max_position_embeddings=trained
                )
            )
    return guesses


def _frequencies(head: int, theta: float) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)


def _factors(scaling: RopeScaling, trained: int, head: int, theta: float) -> np.ndarray:
    if scaling.kind == "default":
        return np.ones(head // 2, np.float32)
    return (1 / llama3_shares(scaling, trained, _frequencies(head, theta))).numpy()
