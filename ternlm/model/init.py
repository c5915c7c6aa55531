"""Initial weights: InternLM's per-matrix deviations, or a plain scheme.

Each parameter draws from a generator seeded by (seed, its name): its values depend neither on the order of
construction nor on how the model is laid out over devices.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from ternlm.config.model import ModelConfig

_LAYER_PREFIX = "model.layers."


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter in place; the same seed gives the same weights on devices of one type."""
    for name, parameter in model.named_parameters():
        fill_initial(parameter, name, config, seed)


@torch.no_grad()
def fill_initial(
    part: Tensor,
    name: str,
    config: ModelConfig,
    seed: int,
    shape: tuple[int, ...] | None = None,
    offset: tuple[int, ...] | None = None,
) -> None:
    """Fill a parameter in place, or the part of it that begins at `offset` of the whole, which has `shape`.

    The whole is drawn and cut, so that the values don't depend on how it is laid out; it exists for a moment.
    """
    if name.endswith((".lora_B.weight", ".magnitude")):
        part.zero_()  # at first an adapter changes nothing; lengths come from the weights
        return
    std = parameter_std(name, config)
    if std is None:
        part.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    whole = part if shape is None or tuple(part.shape) == shape else part.new_empty(shape)
    generator = torch.Generator(part.device)
    generator.manual_seed(_seed_of(seed, name))
    whole.normal_(0.0, std, generator=generator)
    if whole is not part and offset is not None:
        part.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))])


def parameter_std(name: str, config: ModelConfig) -> float | None:
    """Return the standard deviation that a parameter starts with; None for norms (1) and biases (0)."""
    if name.endswith("bias") or "norm" in name.split(".")[-2]:
        return None
    if name.endswith(".lora_A.weight"):  # the deviation of the uniform start of linear maps, which PEFT gives them
        return _inputs(name, config) ** -0.5 / math.sqrt(3)
    if config.init.kind == "plain":
        to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        return config.init.std / (math.sqrt(2 * config.num_hidden_layers) if to_residual else 1.0)
    if not name.startswith(_LAYER_PREFIX):
        return 0.0052
    layer = int(name.removeprefix(_LAYER_PREFIX).split(".")[0])
    # The ancestor scales its second matrix, which is the up projection, not the one that writes the residual.
    if name.endswith(("o_proj.weight", "up_proj.weight")):
        return 0.006 / math.sqrt(2 * (layer + 1))
    return 0.0015 if name.endswith("down_proj.weight") else 0.006


def _inputs(name: str, config: ModelConfig) -> int:
    """Return the columns of the matrix that an adapter is of."""
    if "o_proj" in name:
        return config.num_attention_heads * config.head_size
    return config.intermediate_size if "down_proj" in name else config.hidden_size


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
