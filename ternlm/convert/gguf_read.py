"""Opens a GGUF file as a model: its shape and facts from the metadata, its weights dequantized when they are read.

The container is `gguf_file`'s business, the vocabulary `gguf_tokenizer`'s.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.convert.gguf_file import GgufFile, read_gguf_file
from ternlm.convert.gguf_names import INTERLEAVED, gguf_name, is_rotated, rows_from_interleaved
from ternlm.convert.gguf_rope import ROPE_FACTORS, decimal, read_scaling
from ternlm.convert.gguf_tokenizer import read_tokenizer, stop_ids
from ternlm.convert.weights import ConvertError, OpenModel, check_weights, cut, model_shapes


def open_gguf(path: Path) -> OpenModel:
    """Open a GGUF file. Raises ConvertError for what it can't be: no weights are read before all is known."""
    file = read_gguf_file(path)
    config = _read_config(file)
    weights = GgufWeights(file, config)
    check_weights(path, config, weights)
    return OpenModel(path, config, weights, read_tokenizer(path, file.metadata), _read_facts(file.metadata))


class GgufWeights:
    """A GGUF file's tensors under the model's names; as `Weights`. Quantized ones are float32."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        """The configuration must be the file's."""
        self._file, self._head_size = file, config.head_size
        self._interleaved = INTERLEAVED[file.metadata["general.architecture"]]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._absent: set[str] = set()
        ours = model_shapes(config)
        for name, shape in ours.items():
            if (place := file.tensors.get(gguf_name(name))) is not None:
                self._shapes[name] = place.shape
            elif name.endswith("o_proj.bias"):  # Qwen2 has biases on q, k and v alone
                self._shapes[name] = shape
                self._absent.add(name)
        unknown = file.tensors.keys() - {gguf_name(name) for name in ours} - {ROPE_FACTORS}
        self._shapes |= {name: file.tensors[name].shape for name in sorted(unknown)}

    def names(self) -> Sequence[str]:
        """As `Weights`."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """As `Weights`."""
        return self._shapes[name]

    def read(self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """As `Weights`."""
        whole = self._shapes[name]
        if name in self._absent:
            return cut(torch.zeros(whole), offset, shape)
        order = None
        if self._interleaved and is_rotated(name):
            order = rows_from_interleaved(whole[0], self._head_size)
        if len(whole) == 1:
            vector = self._file.read(gguf_name(name))
            return cut(vector if order is None else vector[torch.from_numpy(order)], offset, shape)
        if offset is None or shape is None:
            return self._file.read(gguf_name(name), order)
        rows, columns = (slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        return self._file.read(gguf_name(name), rows if order is None else order[rows], columns)


def _read_config(file: GgufFile) -> ModelConfig:
    path, metadata, tensors = file.path, file.metadata, file.tensors
    architecture = metadata.get("general.architecture")
    if architecture not in INTERLEAVED:
        raise ConvertError(
            f"{path}: architecture {architecture!r} isn't supported; those that are: {', '.join(INTERLEAVED)}"
        )
    _refuse_unsupported(file, architecture)
    hidden = _count(file, "embedding_length")
    heads = _count(file, "attention.head_count")
    head = _count(file, "attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _count(file, key, head) != head:
            raise ConvertError(f"{path}: {architecture}.{key} differs from the size of a head, {head}; not supported")
    context, layers = _count(file, "context_length"), _count(file, "block_count")
    if layers > len(tensors):  # before a name is made for each
        raise ConvertError(f"{path}: {architecture}.block_count is {layers}, and it has {len(tensors)} tensors in all")
    try:
        return ModelConfig(
            vocab_size=tensors["token_embd.weight"].shape[0],
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_count(file, "attention.head_count_kv", heads),
            head_dim=None if head * heads == hidden else head,
            intermediate_size=_count(file, "feed_forward_length"),
            attention_bias="blk.0.attn_q.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
            tie_word_embeddings="output.weight" not in tensors,
            rms_norm_eps=decimal(metadata.get(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)),
            rope_theta=decimal(metadata.get(f"{architecture}.rope.freq_base", 10000.0)),
            rope_scaling=read_scaling(file, head, context),
            max_position_embeddings=context,
        )
    except ValidationError as trouble:
        first = trouble.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConvertError(f"{path}: its metadata make no model ({where}: {first['msg']}); fetch it again") from trouble


def _refuse_unsupported(file: GgufFile, architecture: str) -> None:
    metadata = file.metadata
    problems = {
        "it is one of several files; join them with llama.cpp's llama-gguf-split --merge": metadata.get(
            "split.count", 1
        )
        > 1,
        "it is a mixture of experts, which isn't supported": metadata.get(f"{architecture}.expert_count", 0) > 0,
        "it has no token_embd.weight; is it a language model?": "token_embd.weight" not in file.tensors,
    }
    for problem, there in problems.items():
        if there:
            raise ConvertError(f"{file.path}: {problem}")


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    """Return a number above 0 of the architecture's."""
    key = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(key, default)
    if isinstance(value, np.ndarray) and len(set(value.tolist())) == 1:
        value = int(value[0])
    if not isinstance(value, int) or value <= 0:
        what = "missing" if value is None else f"{value}"
        raise ConvertError(f"{file.path}: {key} is {what}, and must be a number above 0, the same for all layers")
    return value


def _read_facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if "tokenizer.chat_template" in metadata:
        facts["chat_template"] = metadata["tokenizer.chat_template"]
    generation: dict[str, Any] = {}
    if ends := stop_ids(metadata):
        generation["eos_token_id"] = ends
    if "tokenizer.ggml.bos_token_id" in metadata:
        generation["bos_token_id"] = metadata["tokenizer.ggml.bos_token_id"]
    if generation:
        facts["generation"] = generation
    return facts
