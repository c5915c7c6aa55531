"""The shape of a model, in the field names of a Hugging Face `config.json`, and the presets.

Pure data: parameter counts are derived here so that the planner and the trainer agree without torch.
"""

from typing import Any, Literal

from pydantic import ConfigDict, model_validator

from ternlm.config.section import Section, refuse_ignored, setting

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]


class RopeScaling(Section):
    """How rotary positions are stretched past the trained length."""

    kind: RopeKind = setting(
        "default",
        "default: unscaled; linear: positions divided by factor; dynamic: the base grows with the length "
        "(dynamic NTK); yarn: per-frequency interpolation (arXiv 2309.00071); llama3: Llama 3.1's",
    )
    factor: float = setting(1.0, "how many times the trained length is stretched", ge=1.0)
    original_max_position_embeddings: int | None = setting(
        None, "trained length; max_position_embeddings when not given", unit="tokens", gt=0
    )
    beta_fast: float = setting(32.0, "yarn: rotations above which a frequency is left as it is", gt=0)
    beta_slow: float = setting(1.0, "yarn: rotations below which a frequency is fully interpolated", gt=0)
    attention_factor: float | None = setting(
        None, "yarn: scale of cos and sin; 0.1 ln(factor) + 1 when not given", gt=0
    )
    low_freq_factor: float = setting(1.0, "llama3: rotations over the trained length up to which factor counts", gt=0)
    high_freq_factor: float = setting(4.0, "llama3: rotations above which a frequency is left as it is", gt=0)

    @model_validator(mode="after")
    def _check(self) -> "RopeScaling":
        if self.kind == "default":
            refuse_ignored(self, ("factor",), "kind = 'default'", "choose another kind")
        if self.kind not in ("dynamic", "yarn", "llama3"):
            length = "original_max_position_embeddings"
            refuse_ignored(self, (length,), f"kind = {self.kind!r}", "set kind to 'dynamic', 'yarn' or 'llama3'")
        if self.kind != "llama3":
            bounds = ("low_freq_factor", "high_freq_factor")
            refuse_ignored(self, bounds, f"kind = {self.kind!r}", "set kind to 'llama3'")
        if self.kind != "yarn":
            names = ("beta_fast", "beta_slow", "attention_factor")
            refuse_ignored(self, names, f"kind = {self.kind!r}", "set kind to 'yarn'")
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow = {self.beta_slow} must be below beta_fast = {self.beta_fast}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor = {self.low_freq_factor} must be below high_freq_factor = {self.high_freq_factor}"
            )
        return self


class InitConfig(Section):
    """How weights start."""

    kind: Literal["internlm", "plain"] = setting(
        "internlm",
        "internlm: the ancestor's per-matrix deviations; plain: normal(std), outputs of a block scaled by "
        "1/sqrt(2 layers)",
    )
    std: float = setting(0.02, "plain: standard deviation", gt=0)

    @model_validator(mode="after")
    def _check(self) -> "InitConfig":
        if self.kind != "plain":
            refuse_ignored(self, ("std",), f"kind = {self.kind!r}", "set kind to 'plain'")
        return self


# What a preset fixes; every other field keeps its default unless the recipe says otherwise.
PRESETS: dict[str, dict[str, Any]] = {
    "internlm-7b": {
        "vocab_size": 103168, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 11008, "attention_bias": True, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "rope_theta": 10000.0,
    },
    "internlm-7b-8k": {
        "vocab_size": 103168, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 11008, "attention_bias": True, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 10000.0,
    },
    "internlm-20b": {
        "vocab_size": 103168, "hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 40,
        "num_key_value_heads": 40, "intermediate_size": 13824, "attention_bias": True, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "rope_theta": 10000.0,
    },
    "internlm2-1.8b": {
        "vocab_size": 92544, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 8, "intermediate_size": 8192, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    },
    "internlm2-7b": {
        "vocab_size": 92544, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    },
    "internlm2-20b": {
        "vocab_size": 92544, "hidden_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 48,
        "num_key_value_heads": 8, "intermediate_size": 16384, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 256, "attention_bias": True,
        "max_position_embeddings": 256,
    },
    "tiny-gqa": {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 256, "max_position_embeddings": 256,
    },
}  # fmt: skip


def _preset_or_shape(schema: dict[str, Any]) -> None:
    """Say in the JSON schema what `_fill_from_preset` means: a preset makes the shape's fields optional."""
    schema["properties"]["preset"]["enum"] = [*PRESETS, None]
    schema["anyOf"] = [{"required": ["preset"]}, {"required": schema.pop("required")}]


class ModelConfig(Section):
    """One decoder: RMSNorm, rotary positions, SwiGLU, multi-head or grouped-query attention."""

    model_config = ConfigDict(json_schema_extra=_preset_or_shape)

    preset: str | None = setting(None, f"start from a known shape: {', '.join(PRESETS)}")
    vocab_size: int = setting(..., "rows of the embedding and the head; at least the tokenizer's", unit="tokens", gt=0)
    hidden_size: int = setting(..., "width of the residual stream", gt=0)
    num_hidden_layers: int = setting(..., "number of blocks", gt=0)
    num_attention_heads: int = setting(..., "query heads", gt=0)
    num_key_value_heads: int | None = setting(None, "key/value heads; num_attention_heads (MHA) when not given", gt=0)
    head_dim: int | None = setting(None, "size of a head; hidden_size / num_attention_heads when not given", gt=0)
    intermediate_size: int = setting(..., "width of the SwiGLU MLP", gt=0)
    attention_bias: bool = setting(False, "biases on q, k, v and o")
    qk_norm: bool = setting(False, "RMSNorm over each head of q and k before rotation")
    tie_word_embeddings: bool = setting(False, "the head uses the embedding's weight")
    rms_norm_eps: float = setting(1e-5, "epsilon of the RMSNorms", gt=0)
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", gt=0)
    rope_scaling: RopeScaling = setting(RopeScaling, "stretching of the rotary positions")
    max_position_embeddings: int = setting(2048, "longest sequence trained for", unit="tokens", gt=0)
    init: InitConfig = setting(InitConfig, "initial weights")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, dict) else None
        if not isinstance(preset, str):
            return given
        if preset not in PRESETS:
            raise ValueError(f"preset = {preset!r} is not known; choose one of {', '.join(PRESETS)}")
        # None means "not given", as everywhere: otherwise a saved config, which has no None, would read back
        # with the preset's value.
        return {**PRESETS[preset], **{name: value for name, value in given.items() if value is not None}}

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} must be a multiple of num_attention_heads = "
                f"{self.num_attention_heads}, or set head_dim"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim = {self.head_size} must be even for rotary positions")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads = {self.kv_heads} must divide num_attention_heads = {self.num_attention_heads}"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Size of a head, resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_original_length(self) -> int:
        """Length (tokens) up to which rotary positions were trained."""
        return self.rope_scaling.original_max_position_embeddings or self.max_position_embeddings

    @property
    def num_params(self) -> int:
        """Number of distinct parameters; tied embeddings count once."""
        return self.num_embedding_params + self.num_hidden_layers * self.num_layer_params + self.hidden_size

    @property
    def num_embedding_params(self) -> int:
        """Parameters of the embedding and the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def num_layer_params(self) -> int:
        """Parameters of one block."""
        d, h = self.hidden_size, self.head_size
        q, kv = self.num_attention_heads * h, self.kv_heads * h
        attention = 2 * d * q + 2 * d * kv + (q + 2 * kv + d if self.attention_bias else 0)
        return attention + 3 * d * self.intermediate_size + 2 * d + (2 * h if self.qk_norm else 0)
