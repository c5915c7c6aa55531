"""Writes a model as one GGUF file for llama.cpp and what builds on it, a tensor at a time."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.convert.adapt import stretch, tell_shortened, with_protocol
from ternlm.convert.gguf_file import gguf_package
from ternlm.convert.gguf_names import INTERLEAVED, gguf_name, is_rotated, rows_to_interleaved
from ternlm.convert.gguf_rope import ROPE_FACTORS, rope_factors, write_scaling
from ternlm.convert.gguf_tokenizer import vocabulary_of, write_tokenizer
from ternlm.convert.weights import ConvertError, OpenModel, check_weights, model_shapes, overflows
from ternlm.data.atomic import publish, sync, temporary_path
from ternlm.data.chat import ChatProtocol

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


def export_gguf(
    model: OpenModel,
    out: Path,
    dtype: str = "keep",
    rope: str = "keep",
    max_length: int | None = None,
    chat: ChatProtocol | None = None,
) -> None:
    """Write a model as `write_gguf` does, with another stretch of the context or a chat protocol, as `export_hf`."""
    if out.exists():
        raise ConvertError(f"{out}: exists already; choose another file, or remove it")
    config = stretch(model.config, rope, max_length)
    tell_shortened(model, out, config.max_position_embeddings)
    model = replace(model, config=config)
    write_gguf(with_protocol(model, chat) if chat else model, out, "float16" if dtype == "keep" else dtype)


def write_gguf(model: OpenModel, out: Path, dtype: str = "float16") -> None:
    """Write a model's weights, shape, tokenizer and chat template. Never more than a tensor is in memory.

    dtype: of the matrices, float32, float16 or bfloat16; norms and biases are float32. Until it is whole the file has
    another name. Raises ConvertError for what GGUF can't say before anything is written, and for a value too large for
    float16 without leaving anything.
    """
    if dtype not in _DTYPES:
        raise ConvertError(f"dtype = {dtype!r} can't be written; choose one of {', '.join(_DTYPES)}")
    gguf, config = gguf_package(), model.config
    _check(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(out)
    writer = gguf.GGUFWriter(temporary, _architecture(config))
    try:
        _write_metadata(gguf, writer, model, out, _DTYPES[dtype])
        shapes = model_shapes(config)
        factors = rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for name, shape in shapes.items():
            kind = _dtype_of(shape, _DTYPES[dtype])
            width = np.dtype(np.float32 if kind is torch.float32 else np.uint16)
            raw = gguf.GGMLQuantizationType[_TYPE_NAMES[kind]]
            writer.add_tensor_info(gguf_name(name), shape, width, math.prod(shape) * width.itemsize, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in _tensors(model, shapes, _DTYPES[dtype]):
            writer.write_tensor_data(tensor)
        writer.close()
        sync(temporary)
        publish(temporary, out)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def _architecture(config: ModelConfig) -> str:
    """Return the architecture that does what the model does: llama has no norms of q and k."""
    return "qwen3" if config.qk_norm else "llama"


def _check(model: OpenModel) -> None:
    config = model.config
    check_weights(model.path, config, model.weights)
    if config.rope_scaling.kind == "dynamic":
        raise ConvertError(
            f"{model.path}: rope_scaling.kind = 'dynamic' can't be said in GGUF, nor done by llama.cpp; set it to "
            "'yarn', 'linear' or 'default' for the export"
        )
    if config.rope_scaling.kind == "llama3" and _architecture(config) != "llama":
        raise ConvertError(
            f"{model.path}: rope_scaling.kind = 'llama3' together with norms of q and k (qk_norm) can't be said in "
            "GGUF; export the model as a Hugging Face folder"
        )
    if (config.rope_scaling.beta_fast, config.rope_scaling.beta_slow) != (32, 1):
        raise ConvertError(
            f"{model.path}: rope_scaling.beta_fast = {config.rope_scaling.beta_fast} and beta_slow = "
            f"{config.rope_scaling.beta_slow} would be taken for 32 and 1 by llama.cpp, whatever the file says; export "
            "the model as a Hugging Face folder"
        )
    if config.qk_norm and config.attention_bias:
        raise ConvertError(
            f"{model.path}: GGUF has no architecture with both norms of q and k (qk_norm) and biases "
            "(attention_bias) that llama.cpp loads; export it as a Hugging Face folder"
        )


def _write_metadata(gguf: Any, writer: Any, model: OpenModel, out: Path, dtype: torch.dtype) -> None:
    config, facts = model.config, model.facts
    writer.add_type("model")
    writer.add_name(out.stem)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    write_scaling(gguf, writer, config)
    if model.tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        vocabulary = vocabulary_of(model.path, model.tokenizer, config.vocab_size)
        write_tokenizer(writer, vocabulary, model.tokenizer, facts.get("generation") or {})
    if facts.get("chat_template"):
        writer.add_chat_template(facts["chat_template"])


def _dtype_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    return dtype if len(shape) > 1 else torch.float32


def _tensors(model: OpenModel, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Iterator[np.ndarray]:
    """Yield the tensors as they are to lie in the file."""
    config = model.config
    interleaved = INTERLEAVED[_architecture(config)]
    for name, shape in shapes.items():
        tensor = model.weights.read(name)
        if interleaved and is_rotated(name):
            tensor = tensor[torch.from_numpy(rows_to_interleaved(shape[0], config.head_size))]
        yield _array(model.path, name, tensor, _dtype_of(shape, dtype))


def _array(path: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    if dtype is torch.float16 and overflows(tensor, dtype):
        largest = tensor[tensor.isfinite()].abs().amax().item()
        raise ConvertError(f"{path}: {name} has {largest:g}, too large for float16; write it as bfloat16")
    tensor = tensor.to(dtype).contiguous()
    return tensor.numpy() if dtype is torch.float32 else tensor.view(torch.uint16).numpy()
