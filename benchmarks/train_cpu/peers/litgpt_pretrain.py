"""litgpt's own `pretrain.setup`, which compiles (variant eager: torch.compile is disabled by the environment).

Its loop always compiles, logs every step to a CSV file and writes one checkpoint after the last step, which is not
timed. A step's end is seen from outside, when the loop asks for the next batch.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.model import GPT
from litgpt.pretrain import setup
from record import Job, load_job
from steps import Steps
from torch.utils.data import DataLoader


class FusedAdamW(torch.optim.AdamW):
    """AdamW whose fused kernel litgpt can't switch off: it does so on every device but CUDA."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


class MarkingCollate:
    """Stack rows, and mark the end of the step before: the loop asks for a batch when that step is done."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.asked = False

    def __call__(self, rows: list[torch.Tensor]) -> torch.Tensor:
        if self.asked:
            self.steps.mark()
        self.asked = True
        return torch.stack(rows)


class Windows(DataModule):
    """Windows of seq_len + 1 tokens, as litgpt's loop expects them."""

    def __init__(self, job: Job, steps: Steps) -> None:
        super().__init__()
        tokens = np.load(job.tokens)
        starts = range(0, len(tokens) - job.seq_len, job.seq_len)
        self.rows: Any = [torch.from_numpy(tokens[i : i + job.seq_len + 1].astype(np.int64)) for i in starts]
        self.batch = job.batch
        self.steps = steps

    def connect(
        self, tokenizer: object = None, batch_size: int = 1, max_seq_length: int | None = None, **unused: object
    ) -> None:
        self.batch = batch_size

    def train_dataloader(self) -> DataLoader:
        collate = MarkingCollate(self.steps)
        return DataLoader(self.rows, batch_size=self.batch, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[: self.batch], batch_size=self.batch)


def litgpt_config(job: Job) -> Config:
    """Return the job's shape; litgpt has biases on q, k and v but none on o without biases in the MLP."""
    shape = job.shape
    return Config(
        name="bench",
        block_size=job.seq_len,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_layers,
        n_embd=shape.hidden_size,
        n_head=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        norm_class_name="RMSNorm",
        norm_eps=shape.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        rope_base=int(shape.rope_theta),
        parallel_residual=False,
        bias=False,
        attn_bias=True,
    )


def read_losses(logs: Path) -> list[float]:
    """Return each step's loss from litgpt's CSV log."""
    (path,) = logs.rglob("metrics.csv")
    with path.open(newline="") as lines:
        return [float(row["loss"]) for row in csv.DictReader(lines) if row.get("loss")]


def main() -> None:
    job = load_job()
    steps = job.make_steps()
    config, out = litgpt_config(job), Path(job.scratch)
    optimizer = {
        "class_path": "litgpt_pretrain.FusedAdamW",
        "init_args": {"lr": job.lr, "betas": job.betas, "weight_decay": job.weight_decay},
    }
    setup(
        model_name=config.name,
        model_config=config,
        out_dir=out,
        precision="32-true",
        data=Windows(job, steps),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=job.batch,
            micro_batch_size=job.batch,
            max_tokens=job.total_steps * job.batch * job.seq_len,
            max_norm=job.clip_norm,
            min_lr=job.lr,
            lr_warmup_steps=None,
        ),
        eval=EvalArgs(interval=10**9, final_validation=False),
        optimizer=optimizer,
        devices=1,
        logger_name="csv",
        seed=job.seed,
    )
    with torch.device("meta"):
        num_params = sum(p.numel() for p in GPT(config).parameters())
    steps.report(
        tokens=[job.batch * job.seq_len] * job.total_steps,
        losses=read_losses(out / "logs"),
        packages=["torch", "litgpt", "lightning"],
        said={"num_params": num_params, "boundaries": "one document a row"},
    )


if __name__ == "__main__":
    main()
