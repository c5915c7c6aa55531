"""Write a model as a Hugging Face folder that transformers, vLLM, LMDeploy and others load as native Llama.

Tensors are read and written a file at a time; the folder gets its name when everything in it is on the disk.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.convert.adapt import stretch, tell_shortened, with_protocol
from ternlm.convert.hf_config import write_hf_config
from ternlm.convert.model_card import model_card
from ternlm.convert.new_folder import check_new, new_folder
from ternlm.convert.weights import ConvertError, OpenModel, check_weights, overflows
from ternlm.data import typed
from ternlm.data.chat import ChatProtocol
from ternlm.data.tokenizer import CONFIG_FILE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REMOTE_CODE = Path(__file__).parent / "remote_code" / "modeling_ternlm.py"


def export_hf(
    model: OpenModel,
    out: Path,
    dtype: str = "keep",
    rope: str = "keep",
    max_length: int | None = None,
    shard_bytes: int = 5 * 10**9,
    chat: ChatProtocol | None = None,
) -> None:
    """Write `model` into the new folder `out`.

    dtype: of the weights, or "keep". rope, max_length: as `stretch`. shard_bytes: of one file, at most, unless a
    single tensor is larger. chat: the protocol to write into the tokenizer; the source's own if not given.
    Raises ConvertError or DataError where the folder exists, the model isn't whole or can't chat so; nothing is left.
    """
    check_new(out)
    config = stretch(model.config, rope, max_length)
    check_weights(model.path, model.config, model.weights)
    if chat is not None:
        model = with_protocol(model, chat)
    tell_shortened(model, out, write_hf_config(config)["max_position_embeddings"])
    with new_folder(out) as folder:
        written = _write_weights(model, folder, DTYPES.get(dtype), shard_bytes)
        _write_config(model, config, folder, written)
        _write_tokenizer(model, config, folder)
        (folder / "README.md").write_text(model_card(model, config, out.name, written), encoding="utf-8")


def _write_weights(model: OpenModel, folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> dict[str, Any]:
    """Write the tensors in files of at most `shard_bytes`; return the facts of what was written."""
    placed: list[list[str]] = []
    total, dtypes = 0, set()
    for tensors in _shards(model, dtype, shard_bytes):
        name = f"part-{len(placed):05d}"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        placed.append(list(tensors))
        total += sum(tensor.nbytes for tensor in tensors.values())
        dtypes |= {tensor.dtype for tensor in tensors.values()}
        del tensors  # let go of it before the next one is read
    names = [f"model-{i:05d}-of-{len(placed):05d}.safetensors" for i in range(1, len(placed) + 1)]
    if len(placed) == 1:
        names = ["model.safetensors"]
    for index, name in enumerate(names):
        (folder / f"part-{index:05d}").rename(folder / name)
    if len(placed) > 1:
        where = {tensor: name for name, tensors in zip(names, placed, strict=True) for tensor in tensors}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    common = max(dtypes, key=lambda each: each.itemsize)
    return {"bytes": total, "dtype": str(common).removeprefix("torch."), "files": names}


def _shards(model: OpenModel, dtype: torch.dtype | None, shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name in model.weights.names():
        tensor = model.weights.read(name)
        tensor = (tensor if dtype is None else _cast(model.path, name, tensor, dtype)).contiguous()
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _cast(path: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if overflows(tensor, dtype):
        raise ConvertError(f"{path}: {name} has values too large for {dtype}; choose --dtype bfloat16 or float32")
    return tensor.to(dtype)


def _write_config(model: OpenModel, config: ModelConfig, folder: Path, written: dict[str, Any]) -> None:
    tokenizer, generation = model.tokenizer, dict(model.facts.get("generation", {}))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} if tokenizer else {}
    for name, value in ids.items():
        generation.setdefault(name, value)
    generation = {name: value for name, value in generation.items() if value is not None}
    end = {name: generation[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in generation}
    content = {**write_hf_config(config), **end, "dtype": written["dtype"], "torch_dtype": written["dtype"]}
    if model.facts.get("chat_template"):
        kind = content["architectures"][0].removesuffix("ForCausalLM")
        code = REMOTE_CODE.read_text(encoding="utf-8").replace("_ARCHITECTURE_", kind)
        code = code.replace("from ternlm.data.typed import", f"from .{Path(typed.__file__).stem} import")
        (folder / REMOTE_CODE.name).write_text(code, encoding="utf-8")
        shutil.copyfile(typed.__file__, folder / Path(typed.__file__).name)
        content["auto_map"] = {"AutoModelForCausalLM": f"{REMOTE_CODE.stem}.TernForCausalLM"}
    _write_json(folder / "config.json", content)
    _write_json(folder / "generation_config.json", generation)


def _write_tokenizer(model: OpenModel, config: ModelConfig, folder: Path) -> None:
    if model.tokenizer is None:
        return
    model.tokenizer.save(folder)
    path = folder / CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model_max_length"] = config.max_position_embeddings
    if end := model.facts.get("eos_token"):
        content["eos_token"] = end  # where engines look for what ends an answer
    if template := model.facts.get("chat_template"):
        content["chat_template"] = template
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_json(path, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
