"""Low-rank adapters: which of the model's matrices get one, of what size, and how the frozen weights are kept."""

from typing import Literal

from pydantic import model_validator

from ternlm.config.model import ModelConfig
from ternlm.config.section import Section, refuse_ignored, setting

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_TARGETS: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdapterConfig(Section):
    """A low-rank update beside frozen matrices: W + (alpha / rank) B A (arXiv 2106.09685)."""

    kind: Literal["lora", "dora"] = setting(
        "lora", "lora; dora: each row's direction by lora, its length learnt apart (arXiv 2402.09353)"
    )
    rank: int = setting(16, "rows of A and columns of B", gt=0)
    alpha: float = setting(32.0, "the update is multiplied with alpha / rank", gt=0)
    rank_stabilized: bool = setting(False, "divide alpha by the root of rank instead (arXiv 2312.03732)")
    targets: tuple[Target, ...] = setting(ALL_TARGETS, "the blocks' matrices that get one", strict=False, min_length=1)
    start: str | None = setting(None, "folder of an adapter in PEFT's format to go on from", alias="from")
    base: Literal["auto", "float32", "bfloat16", "float16", "nf4"] = setting(
        "auto",
        "in which the frozen weights are kept; auto: that of the matrix products; nf4: 4 bits a weight of the blocks' "
        "matrices (arXiv 2305.14314), the rest as auto",
    )
    block_size: int = setting(64, "nf4: neighbouring weights that share a scale", unit="weights", gt=0)

    @model_validator(mode="after")
    def _check(self) -> "AdapterConfig":
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets = {list(self.targets)} names one twice; leave it out")
        if self.base != "nf4":
            refuse_ignored(self, ("block_size",), f"base = {self.base!r}", "set base to 'nf4'")
        return self

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def num_params(self, model: ModelConfig) -> int:
        """Return how many parameters are trained: all adapters' of the model."""
        shapes = matrix_shapes(model)
        return model.num_hidden_layers * sum(self.num_params_of(shapes[name]) for name in self.targets)

    def num_params_of(self, shape: tuple[int, int]) -> int:
        """Return how many parameters the adapter of a matrix has. shape: outputs and inputs."""
        return self.rank * sum(shape) + shape[0] * (self.kind == "dora")


def matrix_shapes(model: ModelConfig) -> dict[Target, tuple[int, int]]:
    """Return outputs and inputs of each of a block's matrices, in the model's order."""
    d, m = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    return {
        "q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q),
        "gate_proj": (m, d), "up_proj": (m, d), "down_proj": (d, m),
    }  # fmt: skip
