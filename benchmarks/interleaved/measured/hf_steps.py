"""Run a Hugging Face Trainer, or one of TRL's, by its own loop, marking the end of each step."""

from typing import Protocol

from steps import Steps
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class MarkSteps(TrainerCallback):
    """Mark the end of each step."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: object
    ) -> None:
        self.steps.mark()


class Job(Protocol):
    """What the arguments of a Trainer depend on, of either benchmark's job."""

    scratch: str
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    seed: int

    @property
    def total_steps(self) -> int: ...


def training_arguments(job: Job, batch: int, compiled: bool) -> dict:
    """Return the arguments that Trainer and SFTTrainer share: fused AdamW, constant rate, clipping, nothing else."""
    return {
        "output_dir": job.scratch,
        "max_steps": job.total_steps,
        "per_device_train_batch_size": batch,
        "optim": "adamw_torch_fused",
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": job.betas[0],
        "adam_beta2": job.betas[1],
        "weight_decay": job.weight_decay,
        "max_grad_norm": job.clip_norm,
        "torch_compile": compiled,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        # Each step's loss is kept in memory only; on a CPU reading it costs nothing.
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": job.seed,
    }


def train(trainer: Trainer, steps: Steps) -> list[float]:
    """Run the trainer's own loop and return each step's loss."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(MarkSteps(steps))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
