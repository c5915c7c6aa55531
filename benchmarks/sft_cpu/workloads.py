"""What is measured: the workloads, the configurations that run each, and what must be reached.

A configuration is `PEER` or `PEER-VARIANT`; each runs as one process of a script in peers/.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

# The peers' processes run with these folders alone on their path, so what they share with this side lies there.
sys.path.insert(0, str(Path(__file__).parent / "peers"))
sys.path.insert(0, str(Path(__file__).parents[1] / "interleaved" / "measured"))
from job import Job

__all__ = ["CONFIGURATIONS", "WORKLOADS", "Aim", "Configuration", "Job", "Workload"]


@dataclass(frozen=True)
class Configuration:
    """One way to fine-tune: the script in peers/ and the environment it runs in (None: TernLM's own)."""

    script: str
    environment: str | None
    label: str
    trains_all: bool
    """Whether it can train all weights, too."""


CONFIGURATIONS = {
    "ternlm": Configuration("ternlm_sft.py", None, "TernLM, four rows of 512 a step, a tenth recomputed", True),
    "ternlm-2048": Configuration("ternlm_sft.py", None, "TernLM, a row of 2048 a step", True),
    "ternlm-eager": Configuration("ternlm_sft.py", None, "TernLM, as above, compile off", True),
    "ternlm-1024": Configuration("ternlm_sft.py", None, "TernLM, two rows of 1024 a step", True),
    "trl": Configuration("trl_sft.py", "hf", "TRL SFTTrainer, packing (bfd)", True),
    "trl-compile": Configuration("trl_sft.py", "hf", "TRL SFTTrainer, packing (bfd), torch_compile", True),
    "trl-padded": Configuration("trl_sft.py", "hf", "TRL SFTTrainer, a padded batch a step", True),
    "trl-single": Configuration("trl_sft.py", "hf", "TRL SFTTrainer, samples one by one", True),
    "trl-single-compile": Configuration("trl_sft.py", "hf", "TRL SFTTrainer, samples one by one, torch_compile", True),
    "litgpt-1": Configuration("litgpt_lora.py", "litgpt", "litgpt finetune_lora, micro batch 1", False),
    "litgpt-2": Configuration("litgpt_lora.py", "litgpt", "litgpt finetune_lora, micro batch 2", False),
    "litgpt-5": Configuration("litgpt_lora.py", "litgpt", "litgpt finetune_lora, micro batch 5", False),
    "litgpt-10": Configuration("litgpt_lora.py", "litgpt", "litgpt finetune_lora, micro batch 10", False),
}


@dataclass(frozen=True)
class Aim:
    """What TernLM is to reach against each configuration whose name begins with `peer`."""

    peer: str
    ratio: float
    memory: float


@dataclass(frozen=True)
class Workload:
    """What is trained of the model, at which rate, and by whom."""

    name: str
    title: str
    rank: int
    """Of the adapters; 0: all weights are trained."""
    lr: float
    configs: tuple[str, ...]
    aims: tuple[Aim, ...]

    def can_run(self, config: str) -> bool:
        """Whether the configuration is made for this."""
        return self.rank > 0 or CONFIGURATIONS[config].trains_all


WORKLOADS = {
    "lora": Workload(
        name="lora",
        title="adapters of rank 16 on all seven matrices of each block",
        rank=16,
        lr=2e-4,
        configs=(
            "ternlm",
            "ternlm-2048",
            "trl",
            "trl-single",
            "trl-single-compile",
            "trl-padded",
            "litgpt-1",
            "litgpt-2",
        ),
        aims=(Aim("trl", ratio=1.6, memory=0.7), Aim("litgpt", ratio=1.2, memory=0.7)),
    ),
    "full": Workload(
        name="full",
        title="all weights",
        rank=0,
        lr=1e-5,
        configs=("ternlm", "ternlm-2048", "trl", "trl-single", "trl-single-compile"),
        aims=(Aim("trl", ratio=1.6, memory=0.7),),
    ),
}
