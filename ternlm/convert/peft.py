"""Adapters in PEFT's format, adapter_config.json and adapter_model.safetensors: read, written, and put into weights.

Adapters are tensors by the names of our parameters, `model.layers.0.self_attn.q_proj.lora_A.weight` and the like.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ternlm.config.adapter import ALL_TARGETS, AdapterConfig
from ternlm.config.model import ModelConfig
from ternlm.convert.files import read_json
from ternlm.convert.new_folder import new_folder
from ternlm.convert.weights import ConvertError, OpenModel, Weights, cut, model_shapes
from ternlm.model.linear import SHORTEST
from ternlm.ops.nf4 import NF4

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What PEFT's settings have that changes the result and isn't supported, with the values that change nothing.
_IDLE: dict[str, tuple[Any, ...]] = {
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "arrow_config": (None,),
    # Others change the weights of the model that the adapter is put beside.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Adapter:
    """An adapter's settings and its tensors, on the CPU."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    base: str | None = None
    """The model that it says it is of."""


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (path / CONFIG_FILE).is_file()


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter; raises ConvertError where it isn't a LoRA or DoRA of the blocks' matrices."""
    content = read_json(folder / CONFIG_FILE)
    if content.get("peft_type") != "LORA":
        raise ConvertError(f"{folder}: peft_type is {content.get('peft_type')!r}; only LORA (with DoRA) can be read")
    for name, idle in _IDLE.items():
        if content.get(name) not in idle:
            raise ConvertError(
                f"{folder / CONFIG_FILE}: {name} = {content[name]!r} isn't supported; retrain without it"
            )
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as trouble:
        raise ConvertError(f"{folder / WEIGHTS_FILE}: can't be read ({trouble}); copy it again") from trouble
    ours = {_our_name(name, folder): tensor for name, tensor in tensors.items()}
    used = {name.split(".lora_")[0].removesuffix(".magnitude").split(".")[-1] for name in ours}
    try:
        config = AdapterConfig.model_validate(
            {
                "kind": "dora" if content.get("use_dora") else "lora",
                "rank": content.get("r"),
                "alpha": float(content.get("lora_alpha", 0)),
                "rank_stabilized": bool(content.get("use_rslora")),
                "targets": [target for target in ALL_TARGETS if target in used],
            }
        )
    except (ValidationError, TypeError, ValueError) as trouble:
        raise ConvertError(f"{folder / CONFIG_FILE}: doesn't describe an adapter ({trouble})") from trouble
    return Adapter(config, ours, content.get("base_model_name_or_path"))


def write_adapter(adapter: Adapter, out: Path) -> None:
    """Write an adapter into the new folder `out`, as PEFT reads it. Raises ConvertError where the folder exists."""
    config = adapter.config
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.rank_stabilized,
        "use_dora": config.kind == "dora",
        "target_modules": sorted(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    with new_folder(out) as folder:
        tensors = {_their_name(name): tensor.contiguous() for name, tensor in adapter.tensors.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def adapter_shapes(model: ModelConfig, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of an adapter's tensors by name, in the model's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in model_shapes(model).items():
        prefix, _, kind = name.rpartition(".")
        if kind == "weight" and prefix.split(".")[-1] in config.targets:
            shapes[f"{prefix}.lora_A.weight"] = (config.rank, shape[1])
            shapes[f"{prefix}.lora_B.weight"] = (shape[0], config.rank)
            if config.kind == "dora":
                shapes[f"{prefix}.magnitude"] = (shape[0],)
    return shapes


def check_adapter(path: Path, adapter: Adapter, model: ModelConfig) -> None:
    """Raise ConvertError unless the tensors are just those of an adapter of this model."""
    wanted = adapter_shapes(model, adapter.config)
    for name in sorted(wanted.keys() ^ adapter.tensors.keys()):
        what = "misses" if name in wanted else "has, beyond this model's,"
        raise ConvertError(f"{path}: {what} {name}; is it an adapter of another model?")
    for name, shape in wanted.items():
        if tuple(adapter.tensors[name].shape) != shape:
            raise ConvertError(
                f"{path}: {name} is {tuple(adapter.tensors[name].shape)}, and this model makes it {shape}; is it an "
                "adapter of another model?"
            )


class MergedWeights:
    """A model's weights with an adapter put in, each made as it is read, in the dtype of the model."""

    def __init__(self, base: Weights, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter

    def names(self) -> Sequence[str]:
        """As `Weights`."""
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """As `Weights`."""
        return self._base.shape(name)

    def read(self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """As `Weights`."""
        prefix = name.removesuffix(".weight")
        if f"{prefix}.lora_A.weight" not in self._adapter.tensors:
            return self._base.read(name, offset, shape)
        return cut(merge(self._base.read(name), prefix, self._adapter), offset, shape)


def merge(weight: Tensor, name: str, adapter: Adapter) -> Tensor:
    """Return the matrix `name` with its adapter put in, in the dtype of `weight`.

    A base that was trained in 4 bits is merged as it was trained with: rounded.
    """
    config, tensors = adapter.config, adapter.tensors
    base = as_frozen(weight, config)
    product = tensors[f"{name}.lora_B.weight"].float() @ tensors[f"{name}.lora_A.weight"].float()
    merged = base + config.scale * product
    if config.kind == "dora":
        lengths = torch.linalg.vector_norm(merged, dim=1).clamp(min=SHORTEST)
        merged *= (tensors[f"{name}.magnitude"].float() / lengths)[:, None]
    return merged.to(weight.dtype)


def as_frozen(weight: Tensor, config: AdapterConfig) -> Tensor:
    """Return a matrix as adapters are trained beside it, in float32: a 4-bit one is rounded."""
    return NF4.quantize(weight, config.block_size).dequantize() if config.base == "nf4" else weight.float()


def with_adapter(model: OpenModel, adapter: Adapter, path: Path) -> OpenModel:
    """Return the model with an adapter put in; raises ConvertError where it isn't one of this model."""
    check_adapter(path, adapter, model.config)
    return replace(model, weights=MergedWeights(model.weights, adapter))


def _our_name(name: str, folder: Path) -> str:
    ours = name.removeprefix(_PREFIX)
    for theirs in (".lora_magnitude_vector.weight", ".lora_magnitude_vector"):
        if ours.endswith(theirs):
            ours = ours.removesuffix(theirs) + ".magnitude"
    known = ours.endswith((".lora_A.weight", ".lora_B.weight", ".magnitude"))
    if not known or not any(f".{target}." in ours for target in ALL_TARGETS):
        raise ConvertError(f"{folder / WEIGHTS_FILE}: {name} isn't part of an adapter of a block's matrices")
    return ours


def _their_name(name: str) -> str:
    return _PREFIX + name.replace(".magnitude", ".lora_magnitude_vector")
