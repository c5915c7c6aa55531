"""Write a model as a Hugging Face folder that transformers, vLLM, LMDeploy and others load as native Llama.

Tensors are read and written a file at a time; the folder gets its name when everything in it is on the disk.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ternlm.config.model import ModelConfig, RopeScaling
from ternlm.convert.hf_config import write_hf_config
from ternlm.convert.model_card import model_card
from ternlm.convert.weights import ConvertError, OpenModel, check_weights
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
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConvertError(f"{out}: exists already; choose another folder, or remove it")
    config = stretch(model.config, rope, max_length)
    check_weights(model.path, model.config, model.weights)
    if chat is not None:
        model = with_protocol(model, chat)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        written = _write_weights(model, folder, DTYPES.get(dtype), shard_bytes)
        _write_config(model, config, folder, written)
        _write_tokenizer(model, config, folder)
        (folder / "README.md").write_text(model_card(model, config, out.name, written), encoding="utf-8")
        _publish(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def stretch(config: ModelConfig, rope: str, max_length: int | None) -> ModelConfig:
    """Return the settings with another way to go past the trained length.

    rope: "keep"; "none"; "dynamic" (the base grows with the length: Hugging Face and LMDeploy); "static-ntk" (the base
    that dynamic has at `max_length`, fixed: every engine); "yarn". max_length (tokens): needed by the last two.
    """
    if rope == "keep":
        if max_length is not None:
            raise ConvertError(f"max_length = {max_length} has no effect with rope = 'keep'; choose static-ntk or yarn")
        return config
    trained = config.rope_original_length
    if rope in ("static-ntk", "yarn") and (max_length is None or max_length <= trained):
        raise ConvertError(
            f"rope = {rope!r} needs a max_length above the trained length, {trained} tokens, not {max_length}; give one"
        )
    if rope == "none":
        return _replaced(config, rope_scaling=RopeScaling(), max_position_embeddings=trained)
    if rope == "dynamic":
        factor = config.rope_scaling.factor if config.rope_scaling.kind == "dynamic" else 1.0
        return _replaced(
            config, rope_scaling=RopeScaling(kind="dynamic", factor=factor), max_position_embeddings=trained
        )
    assert max_length is not None
    if rope == "static-ntk":
        factor, head = config.rope_scaling.factor, config.head_size
        theta = config.rope_theta * (factor * max_length / trained - (factor - 1)) ** (head / (head - 2))
        return _replaced(config, rope_theta=theta, rope_scaling=RopeScaling(), max_position_embeddings=max_length)
    scaling = RopeScaling(kind="yarn", factor=max_length / trained, original_max_position_embeddings=trained)
    return _replaced(config, rope_scaling=scaling, max_position_embeddings=max_length)


def with_protocol(model: OpenModel, chat: ChatProtocol) -> OpenModel:
    """Return the model with a chat protocol of ours; raises DataError where its tokenizer lacks the tokens."""
    if model.tokenizer is None:
        raise ConvertError(f"{model.path}: has no tokenizer, without which nobody can chat; put a tokenizer.json there")
    tokenizer = chat.fit(model.tokenizer)
    ends = [tokenizer.id_of(token) for token in chat.stop]
    generation = {**model.facts.get("generation", {}), "eos_token_id": ends}
    facts = {**model.facts, "chat_template": chat.template, "generation": generation, "eos_token": chat.stop[0]}
    return replace(model, tokenizer=tokenizer, facts=facts)


def _replaced(config: ModelConfig, **changes: Any) -> ModelConfig:
    return config.model_copy(update=changes)


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
        tensor = (tensor if dtype is None else tensor.to(dtype)).contiguous()
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


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
        (folder / REMOTE_CODE.name).write_text(code, encoding="utf-8")
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


def _publish(folder: Path, out: Path) -> None:
    """Make all of it last, then give it its name."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    folder.chmod(0o755)
    if out.is_dir():
        out.rmdir()
    folder.rename(out)
