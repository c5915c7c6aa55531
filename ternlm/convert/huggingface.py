"""Open a Hugging Face folder of the Llama family as one of our models; nothing in it is run.

InternLM2's grouped, fused projections are taken apart, and Qwen2's missing bias of the output projection is zeros; all
other tensors are read as they lie.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.convert.files import open_files, read_json
from ternlm.convert.hf_config import check_token_ids, read_hf_config
from ternlm.convert.weights import ConvertError, Derived, OpenModel, Renamed, Weights, check_weights, model_shapes
from ternlm.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

_INTERNLM2 = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
}


def open_hf(folder: Path) -> OpenModel:
    """Open a folder with a `config.json`; raises ConvertError where it, or a tensor, isn't one that we can use."""
    content = read_json(folder / "config.json")
    config = read_hf_config(content, folder / "config.json")
    generation = _generation(folder, content, config)
    own = open_files(folder)
    if config.num_hidden_layers > len(own.names()):
        raise ConvertError(
            f"{folder}: num_hidden_layers = {config.num_hidden_layers:,}, and its files hold {len(own.names()):,} "
            "tensors; see whether its configuration and files belong together"
        )
    weights = Renamed(own, _origin(config, own, content["model_type"], folder))
    check_weights(folder, config, weights)
    return OpenModel(
        folder,
        config,
        weights,
        _tokenizer(folder),
        _facts(folder, content, config.max_position_embeddings) | {"generation": generation},
    )


def _origin(config: ModelConfig, own: Weights, family: str, folder: Path) -> dict[str, str | Derived]:
    theirs = {name for name in own.names() if not name.endswith("rotary_emb.inv_freq")}
    origin: dict[str, str | Derived] = {}
    used = {"lm_head.weight", "output.weight"} if config.tie_word_embeddings else set()
    for name, shape in model_shapes(config).items():
        if family == "internlm2" and any(f".{p}_proj." in name for p in "qkv"):
            prefix, _, rest = name.partition("self_attn.")
            fused = f"{prefix}attention.wqkv.{rest.split('.')[1]}"
            used.add(fused)
            if fused in theirs:
                _check_fused(folder, fused, own.shape(fused), config)
                origin[name] = Derived(shape, partial(_unfuse, own, fused, config, rest[0]))
            continue
        source = name
        if family == "internlm2":
            source = next((name.replace(ours, new) for ours, new in _INTERNLM2.items() if ours in name), name)
        if source in theirs:
            origin[name] = source
            used.add(source)
        elif family == "qwen2" and name.endswith("o_proj.bias"):
            origin[name] = Derived(shape, partial(torch.zeros, shape, dtype=_dtype_of(own)))
    # What is left over is named as it is called there, for check_weights to refuse.
    return origin | {name: name for name in sorted(theirs - used)}


def _check_fused(folder: Path, name: str, found: tuple[int, ...], config: ModelConfig) -> None:
    rows = (config.num_attention_heads + 2 * config.kv_heads) * config.head_size
    wanted = (rows,) if name.endswith("bias") else (rows, config.hidden_size)
    if found != wanted:
        raise ConvertError(
            f"{folder}: {name} is {found}, and its configuration makes it {wanted}; see whether its configuration and "
            "files belong together"
        )


def _unfuse(own: Weights, name: str, config: ModelConfig, part: str) -> Tensor:
    """Take q, k or v out of rows that lie by key/value head: its queries, then its key, then its value."""
    each = config.num_attention_heads // config.kv_heads
    grouped = own.read(name).unflatten(0, (config.kv_heads, each + 2, config.head_size))
    rows = {"q": grouped[:, :each], "k": grouped[:, each : each + 1], "v": grouped[:, each + 1 :]}
    return rows[part].flatten(0, 2).contiguous()


def _dtype_of(own: Weights) -> torch.dtype:
    return own.read("model.norm.weight").dtype


def _tokenizer(folder: Path) -> Tokenizer | None:
    there = (folder / TOKENIZER_FILE).is_file() or len(list(folder.glob("*.model"))) == 1
    return load_tokenizer(folder) if there else None


def _generation(folder: Path, content: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return the generation settings: their own file's, and the end token of config.json where that has none."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    check_token_ids(content, folder / "config.json", config.vocab_size)
    check_token_ids(generation, path, config.vocab_size)
    if "eos_token_id" not in generation and content.get("eos_token_id") is not None:
        generation |= {"eos_token_id": content["eos_token_id"]}
    return generation


def _facts(folder: Path, content: dict[str, Any], context: int) -> dict[str, Any]:
    source: dict[str, Any] = {"format": "hf", "model_type": content["model_type"]}
    named = content.get("max_position_embeddings")
    if isinstance(named, int) and named > context:
        source["context"] = named  # over which its attention doesn't see everything
    facts: dict[str, Any] = {"source": source}
    template, tokenizer = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file():
        facts["chat_template"] = template.read_text(encoding="utf-8", errors="replace")
    elif tokenizer.is_file():
        written = read_json(tokenizer).get("chat_template")
        if isinstance(written, list):  # several, by name
            named = [each for each in written if isinstance(each, dict) and each.get("name") == "default"]
            written = named[0].get("template") if named else None
        if isinstance(written, str) and written:
            facts["chat_template"] = written
    return facts
