"""What is measured: the workloads, the configurations that run each, what must be reached, and the arithmetic.

A configuration is `PEER` or `PEER-VARIANT`; each runs as one process of a script in peers/.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# The peers' processes run with these folders alone on their path, so what they share with this side lies there.
sys.path.insert(0, str(Path(__file__).parent / "peers"))
sys.path.insert(0, str(Path(__file__).parents[1] / "interleaved" / "measured"))
from record import Job, Shape

__all__ = [
    "CONFIGURATIONS",
    "SGEMM",
    "WORKLOADS",
    "Aim",
    "Configuration",
    "Job",
    "Shape",
    "Workload",
    "resize",
]

SGEMM = "sgemm"


@dataclass(frozen=True)
class Configuration:
    """One way to train: the script in peers/ and the environment it runs in (None: TernLM's own)."""

    script: str
    environment: str | None
    label: str
    packs: bool | None
    """Whether it runs the packed workloads (True), the others (False), or both (None)."""


CONFIGURATIONS = {
    SGEMM: Configuration("sgemm.py", None, "torch matmul", None),
    "ternlm": Configuration("ternlm_run.py", None, "TernLM", None),
    "ternlm-eager": Configuration("ternlm_run.py", None, "TernLM, compile off", None),
    "hf": Configuration("hf_trainer.py", "hf", "HF Trainer", False),
    "hf-compile": Configuration("hf_trainer.py", "hf", "HF Trainer, torch_compile, use_cache", False),
    "hf-compile-mask": Configuration("hf_trainer.py", "hf", "HF Trainer, torch_compile", False),
    "litgpt": Configuration("litgpt_pretrain.py", "litgpt", "litgpt pretrain (compiles)", False),
    "litgpt-eager": Configuration("litgpt_pretrain.py", "litgpt", "litgpt pretrain, compile disabled", False),
    "trl": Configuration("trl_sft.py", "hf", "TRL SFTTrainer, packing (bfd)", True),
    "trl-compile": Configuration("trl_sft.py", "hf", "TRL SFTTrainer, packing (bfd), torch_compile", True),
    "trl-wrapped": Configuration("trl_sft.py", "hf", "TRL SFTTrainer, packing (wrapped)", True),
}


@dataclass(frozen=True)
class Aim:
    """What TernLM is to reach. `against` lists configurations; each of them, and `percent_of_peak`, must hold."""

    against: tuple[str, ...]
    ratio: float
    memory: float | None = None
    percent_of_peak: float | None = None


@dataclass(frozen=True)
class Workload:
    """One model on one kind of data."""

    name: str
    title: str
    shape: Shape
    configs: tuple[str, ...]
    aim: Aim
    batch: int = 1
    seq_len: int = 2048
    mean_document: int | None = None
    """Mean length (tokens) of packed documents; None: each row is one document."""
    resized: bool = False
    """Whether the command line changed it; the aim holds for the workload as it is only."""

    def can_run(self, config: str) -> bool:
        """Whether the configuration is made for this kind of data."""
        packs = CONFIGURATIONS[config].packs
        return config != SGEMM and packs in (None, self.mean_document is not None)

    @property
    def flops_per_token_without_attention(self) -> float:
        """6 N: N counts the weights a token is multiplied with, the blocks' matrices and the head."""
        shape = self.shape
        block = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
        return 6.0 * (shape.num_layers * block + shape.vocab_size * shape.hidden_size)

    def flops_per_token(self, document_lengths: list[int]) -> float:
        """Forward and backward FLOPs of a token: 6 N + attention, causal half, inside the token's own document."""
        mean_square = sum(n * n for n in document_lengths) / sum(document_lengths)
        attention = 6.0 * self.shape.num_layers * self.shape.hidden_size * mean_square
        return self.flops_per_token_without_attention + attention


WORKLOADS = {
    "long": Workload(
        name="long",
        title="one long document a row, vocabulary 32000 (71.3M parameters)",
        shape=Shape(vocab_size=32000),
        configs=("ternlm", "hf", "hf-compile", "litgpt", "litgpt-eager"),
        aim=Aim(("hf", "hf-compile", "litgpt", "litgpt-eager"), ratio=1.0, percent_of_peak=78.0),
    ),
    "vocab": Workload(
        name="vocab",
        title="one long document a row, vocabulary 103168 (144M parameters)",
        shape=Shape(vocab_size=103168),
        configs=("ternlm", "hf", "hf-compile"),
        aim=Aim(("hf", "hf-compile"), ratio=1.25, memory=0.6),
    ),
    "packed": Workload(
        name="packed",
        title="short documents (mean 400 tokens) packed into rows, vocabulary 32000 (71.3M parameters)",
        shape=Shape(vocab_size=32000),
        configs=("ternlm", "trl", "trl-compile", "trl-wrapped"),
        aim=Aim(("trl", "trl-compile"), ratio=1.6),
        mean_document=400,
    ),
}


def resize(workload: Workload, **changes: int | None) -> Workload:
    """Return the workload with another batch, seq_len, or field of its shape; None leaves a field as it is."""
    given = {name: value for name, value in changes.items() if value is not None}
    if not given:
        return workload
    of_shape = {name: value for name, value in given.items() if name in Shape.__dataclass_fields__}
    of_workload: dict[str, Any] = {name: value for name, value in given.items() if name not in of_shape}
    shape = replace(workload.shape, **of_shape)
    title = f"{workload.title}, resized: {', '.join(f'{name} {value}' for name, value in given.items())}"
    return replace(workload, shape=shape, title=title, resized=True, **of_workload)
