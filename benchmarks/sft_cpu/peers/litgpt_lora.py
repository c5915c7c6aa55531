"""litgpt's own `finetune.lora.setup`; the variant is the micro batch, and the step's samples accumulate.

litgpt has neither packing, nor clipping, nor a constant learning rate here: the optimizer that it is given by name has
the last two, and marks the end of each step. It compiles nothing. It validates on one sample before the first step,
and saves the adapters after the last, which is not timed.
"""

import csv
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from job import Job, describe_samples, load_job
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON
from litgpt.finetune import lora
from litgpt.prompts import PromptStyle
from steps import Steps

STEPS: list[Steps] = []
"""Filled by main: litgpt makes the optimizer from its name and numbers alone."""


class MarkingAdamW(torch.optim.AdamW):
    """Fused AdamW at a constant rate that clips the gradient's norm and marks the end of each step."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float, clip: float) -> None:
        # All of the model's parameters come, also those that are frozen.
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.constant_lr = lr
        self.clip_norm = clip

    def step(self, closure: Any = None) -> Any:
        """Take a step, whatever rate a scheduler has set."""
        for group in self.param_groups:
            group["lr"] = self.constant_lr
            torch.nn.utils.clip_grad_norm_(group["params"], self.clip_norm)
        loss = super().step(closure)
        STEPS[0].mark()
        return loss


class ModelsOwn(PromptStyle):
    """The model's chat template around one question, up to where the answer begins."""

    def __init__(self, before: str, after: str) -> None:
        self.before = before
        self.after = after

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **unused: str) -> str:
        return f"{self.before}{prompt}{self.after}"


def read_style(data: Path) -> ModelsOwn:
    """Return the prompt style that data.py has written down."""
    before, after = (data / "litgpt" / "style.txt").read_text().split("{question}")
    return ModelsOwn(before, after)


def fine_tune(job: Job, data: JSON, out: Path) -> None:
    """Run litgpt's own fine-tuning, without the merging at its end: that reads the rank off the command line."""
    lora.merge_lora = lambda **unused: None
    micro = int(job.variant)
    optimizer = {
        "class_path": "litgpt_lora.MarkingAdamW",
        "init_args": {"lr": job.lr, "betas": job.betas, "weight_decay": job.weight_decay, "clip": job.clip_norm},
    }
    lora.setup(
        checkpoint_dir=Path(job.model),
        out_dir=out,
        precision="32-true",
        devices=1,
        lora_r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
        data=data,
        train=TrainArgs(
            save_interval=None,
            log_interval=1,  # its CSV file is never written at another
            global_batch_size=job.samples,
            micro_batch_size=micro,
            lr_warmup_steps=1,
            epochs=1,
            max_steps=job.total_steps,
        ),
        eval=EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, final_validation=False),
        optimizer=optimizer,
        logger_name="csv",
        seed=job.seed,
    )


def read_log(logs: Path, accumulated: int) -> tuple[list[int], list[float]]:
    """Return each step's real tokens, of prompts and answers, and its loss from litgpt's log of micro batches."""
    (path,) = logs.rglob("metrics.csv")
    with path.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("loss")][accumulated - 1 :: accumulated]
    seen = [0, *(int(float(row["tokens"])) for row in rows)]
    return [after - before for before, after in pairwise(seen)], [float(row["loss"]) for row in rows]


def main() -> None:
    import litgpt_lora  # the module that litgpt finds the optimizer in is another one than __main__

    job = load_job()
    steps, out = job.make_steps(), Path(job.scratch)
    litgpt_lora.STEPS.append(steps)
    folder = Path(job.data)
    data = JSON(json_path=folder / "litgpt", mask_prompt=True, prompt_style=read_style(folder), num_workers=1)
    fine_tune(job, data, out)
    tokens, losses = read_log(out / "logs", job.samples // int(job.variant))
    weights = torch.load(out / "final" / "lit_model.pth.lora", mmap=True)["model"]
    samples = (data.train_dataset[i] for i in range(len(data.train_dataset)))
    steps.report(
        tokens=tokens,
        losses=losses,
        packages=["torch", "litgpt", "lightning"],
        said={
            "num_trained": sum(tensor.numel() for tensor in weights.values()),
            "boundaries": "one sample a row",
            "data": describe_samples((x["input_ids"].tolist(), x["labels"].tolist()) for x in samples),
        },
    )


if __name__ == "__main__":
    main()
