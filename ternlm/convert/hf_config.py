"""Hugging Face's `config.json` to our settings and back.

Reads the Llama family: Llama, Mistral, Qwen2, Qwen3, and InternLM and InternLM2 with their own files. What would change
the result and isn't supported is refused by name, never passed over.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ternlm.config.model import ModelConfig
from ternlm.convert.weights import ConvertError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "internlm", "internlm2")
# Fields that change the result, with the only values that this decoder can do.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "is_causal": (True, None),
    "logits_scaling": (1, None),
    "embedding_multiplier": (1, None),
}
_ROPE_NUMBERS = ("factor", "beta_fast", "beta_slow", "attention_factor", "low_freq_factor", "high_freq_factor")


def read_hf_config(content: dict[str, Any], path: Path) -> ModelConfig:
    """Return the model that a `config.json` describes; raises ConvertError. `path` is for messages."""
    try:
        return _read(content, path)
    except (AttributeError, KeyError, TypeError, ValueError) as trouble:  # values of another kind than they should be
        if isinstance(trouble, ConvertError):
            raise
        raise ConvertError(f"{path}: doesn't describe a model ({trouble}); fetch the file again") from trouble


def _read(content: dict[str, Any], path: Path) -> ModelConfig:
    family = content.get("model_type")
    if family not in FAMILIES:
        raise ConvertError(
            f"{path}: model_type = {family!r} isn't supported; models of {', '.join(FAMILIES)} can be read"
        )
    for name, values in _ONLY.items():
        if content.get(name) not in values:
            raise ConvertError(f"{path}: {name} = {content[name]!r} isn't supported, only {values[0]!r}")
    longest = content.get("max_position_embeddings", 2048)
    settings = {
        "vocab_size": content.get("vocab_size"),
        "hidden_size": content.get("hidden_size"),
        "num_hidden_layers": content.get("num_hidden_layers"),
        "num_attention_heads": content.get("num_attention_heads"),
        "num_key_value_heads": content.get("num_key_value_heads") or content.get("num_attention_heads"),
        "head_dim": _unusual_head(content),
        "intermediate_size": content.get("intermediate_size"),
        "attention_bias": _has_bias(family, content),
        "qk_norm": family == "qwen3",
        "tie_word_embeddings": content.get("tie_word_embeddings", False),
        "rms_norm_eps": content.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": _window(content, longest),
        **_read_rope(content, path),
    }
    try:
        return ModelConfig.model_validate({k: v for k, v in settings.items() if v is not None}, strict=False)
    except ValidationError as trouble:
        first = trouble.errors()[0]
        what = ".".join(map(str, first["loc"])) or "it"
        raise ConvertError(f"{path}: {what}: {first['msg']}; fetch the file again") from trouble


def check_token_ids(content: dict[str, Any], path: Path, vocab_size: int) -> None:
    """Raise ConvertError unless the ids of tokens that `content`, a file at `path`, names are of the vocabulary.

    Each of `bos_token_id`, `eos_token_id` and `pad_token_id` is an id, or null, or missing; eos may be a list of ids.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(name)
        ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
        if value is not None and not all(type(index) is int and 0 <= index < vocab_size for index in ids):
            several = ", or a list of such" if name == "eos_token_id" else ""
            raise ConvertError(
                f"{path}: {name} = {value!r} must be a whole number from 0 to {vocab_size - 1}, an id of the model's "
                f"vocabulary{several}; correct it, or leave it out"
            )


def write_hf_config(model: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` of a model as native Llama, or Qwen3 where heads of q and k are normed.

    Both spellings of the rotary settings: `rope_parameters` of transformers 5, and the older two fields.
    """
    kind = "Qwen3" if model.qk_norm else "Llama"
    rope = _write_rope(model)
    # Dynamic scaling begins past max_position_embeddings there, so this is the trained length.
    longest = model.rope_original_length if model.rope_scaling.kind == "dynamic" else model.max_position_embeddings
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    content: dict[str, Any] = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.intermediate_size,
        "hidden_act": "silu",
        "attention_bias": model.attention_bias,
        "tie_word_embeddings": model.tie_word_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "max_position_embeddings": longest,
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else {**old, "type": rope["rope_type"]},
        "use_cache": True,
    }
    if not model.qk_norm:
        content |= {"mlp_bias": False, "pretraining_tp": 1}
    else:
        content |= {"use_sliding_window": False, "sliding_window": None}
    return content


def _has_bias(family: str, content: dict[str, Any]) -> bool:
    if family == "qwen2":
        return True  # on q, k and v; o's is read as zeros
    name = "bias" if family in ("internlm", "internlm2") else "attention_bias"
    return bool(content.get(name, family == "internlm"))


def _unusual_head(content: dict[str, Any]) -> int | None:
    """Return the size of a head where it isn't the one that follows from the rest."""
    size, width, heads = (content.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    return None if size and width and heads and size * heads == width else size


def _window(content: dict[str, Any], longest: int) -> int:
    """Return the longest sequence over which attention sees everything, as this decoder's does."""
    window = content.get("sliding_window", 4096 if content.get("model_type") == "mistral" else None)
    kinds = content.get("layer_types")
    if window is not None and isinstance(kinds, list):
        return min(int(window), longest) if "sliding_attention" in kinds else longest
    if window is None or content.get("use_sliding_window") is False:
        return longest
    if content.get("model_type") in ("qwen2", "qwen3") and "use_sliding_window" not in content:
        return longest  # off unless set
    if window < longest and content.get("max_window_layers", 0) != content.get("num_hidden_layers"):
        return int(window)
    return longest


def _read_rope(content: dict[str, Any], path: Path) -> dict[str, Any]:
    given = content.get("rope_parameters") or content.get("rope_scaling") or {}
    theta = given.get("rope_theta") or content.get("rope_theta") or 10000.0
    rotary = content.get("rotary")
    if content.get("model_type") == "internlm" and isinstance(rotary, dict):
        theta = rotary.get("base", theta)
        given = {"type": rotary.get("type", "default"), "factor": rotary.get("scaling_factor", 1.0)}
        if given["type"] in ("origin", "default"):
            given = {}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise ConvertError(f"{path}: rotary scaling of type {kind!r} isn't supported")
    odd = [name for name in ("mscale", "mscale_all_dim", "short_factor", "long_factor") if given.get(name)]
    if given.get("truncate") is False:
        odd.append("truncate")
    if odd:
        raise ConvertError(f"{path}: rotary scaling with {', '.join(odd)} isn't supported")
    longest = content.get("max_position_embeddings", 2048)
    original = given.get("original_max_position_embeddings") or content.get("original_max_position_embeddings")
    if kind == "yarn" and given.get("factor") is None and original:
        given = {**given, "factor": longest / original}
    if kind in ("linear", "yarn", "llama3") and given.get("factor") is None:
        raise ConvertError(f"{path}: rotary scaling of type {kind!r} needs a factor; fetch the file again")
    scaling: dict[str, Any] = {"kind": kind}
    if kind != "default":
        scaling |= {name: float(given[name]) for name in _ROPE_NUMBERS if given.get(name) is not None}
    if kind == "linear":
        scaling = {"kind": kind, "factor": scaling.get("factor", 1.0)}
    if kind in ("yarn", "llama3") and original:
        scaling["original_max_position_embeddings"] = int(original)
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def _write_rope(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    rope: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": model.rope_theta}
    if scaling.kind != "default":
        rope["factor"] = scaling.factor
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            rope["attention_factor"] = scaling.attention_factor
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = model.rope_original_length
    return rope
