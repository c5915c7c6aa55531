"""Hugging Face Trainer on LlamaForCausalLM: one long document a row (variants: plain, compile, compile-mask).

Compiled, transformers gives attention a dense mask, which is slow, unless the model is told to keep a cache; so
`compile` sets use_cache, and `compile-mask` is what torch_compile=True alone does.
"""

import numpy as np
from hf_steps import train, training_arguments
from record import Job, load_job
from torch import from_numpy
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed


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


def main() -> None:
    job = load_job()
    steps = job.make_steps()
    model = build_llama(job)
    compiled = job.variant.startswith("compile")
    arguments = training_arguments(job, job.batch, compiled) | {"use_cache": job.variant == "compile"}
    trainer = Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=Rows(job))
    losses = train(trainer, steps)
    steps.report(
        tokens=[job.batch * job.seq_len] * job.total_steps,
        losses=losses,
        packages=["torch", "transformers", "accelerate"],
        said={"num_params": sum(p.numel() for p in model.parameters()), "boundaries": "one document a row"},
    )


if __name__ == "__main__":
    main()
