"""Hugging Face Trainer on LlamaForCausalLM: one long document a row (variants: plain, compile, compile-mask).

Compiled, transformers gives attention a dense mask, which is slow, unless the model is told to keep a cache; so
`compile` sets use_cache, and `compile-mask` is what torch_compile=True alone does.
"""

import numpy as np
from record import Job, Steps, load_job
from torch import from_numpy
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)


class Rows(Dataset):
    """Rows of `seq_len` tokens."""

    def __init__(self, job: Job) -> None:
        tokens = np.load(job.tokens)
        self.rows = tokens[: len(tokens) // job.seq_len * job.seq_len].reshape(-1, job.seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": row, "labels": row}


class MarkSteps(TrainerCallback):
    """Mark the end of each step."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: object
    ) -> None:
        self.steps.mark()


def build_llama(job: Job) -> LlamaForCausalLM:
    """Build the job's model in float32, with transformers' own initialisation and default attention (sdpa)."""
    shape = job.shape
    set_seed(job.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_heads,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=job.seq_len,
            rms_norm_eps=shape.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            attention_bias=True,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def training_arguments(job: Job, compiled: bool) -> dict:
    """Return the arguments that Trainer and SFTTrainer share: fused AdamW, constant rate, clipping, nothing else."""
    return {
        "output_dir": job.scratch,
        "max_steps": job.total_steps,
        "per_device_train_batch_size": job.batch,
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


def main() -> None:
    job = load_job()
    steps = Steps(job)
    model = build_llama(job)
    compiled = job.variant.startswith("compile")
    arguments = training_arguments(job, compiled) | {"use_cache": job.variant == "compile"}
    trainer = Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=Rows(job))
    losses = train(trainer, steps)
    steps.report(
        tokens=[job.batch * job.seq_len] * job.total_steps,
        losses=losses,
        num_params=sum(p.numel() for p in model.parameters()),
        boundaries="one document a row",
        packages=["torch", "transformers", "accelerate"],
    )


if __name__ == "__main__":
    main()
