"""TRL's SFTTrainer with peft's LoRA, or all weights where the job has no rank.

Variants: plain packs by its default `bfd`; padded makes a batch of the step's samples; single takes them one by one, so
that nothing is padded. `-compile` turns torch_compile on.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hf_steps import train, training_arguments
from job import Job, describe_samples, load_job
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, whose template ends an answer without the line break that follows it.

    SFTTrainer would have that break learnt with the answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ending = "'<|im_end|>' + '\n'}}"
    if tokenizer.chat_template.count(ending) != 1:
        raise RuntimeError(f"the model's chat template has no, or not one, {ending}: {tokenizer.chat_template}")
    mended = "'<|im_end|>' + ('' if loop.last and message['role'] == 'assistant' else '\n')}}"
    tokenizer.chat_template = tokenizer.chat_template.replace(ending, mended)
    return tokenizer


def make_arguments(job: Job) -> SFTConfig:
    """Return the trainer's arguments for the variant: how a step's samples are laid out."""
    variants: dict[str, tuple[int, dict[str, Any]]] = {
        "": (1, {"packing": True}),
        "padded": (job.samples, {}),
        "single": (1, {"gradient_accumulation_steps": job.samples}),
    }
    batch, layout = variants[job.variant.removesuffix("compile").removesuffix("-")]
    shared = training_arguments(job, batch, compiled=job.variant.endswith("compile"))
    return SFTConfig(**shared, max_length=job.seq_len, **layout)


def make_trainer(job: Job) -> SFTTrainer:
    """Return the trainer, with its data prepared."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    lora = LoraConfig(r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
    return SFTTrainer(
        model=model,
        args=make_arguments(job),
        train_dataset=Dataset.from_json(str(Path(job.data) / "prompt_completion.jsonl")),
        processing_class=load_tokenizer(job),
        peft_config=lora if job.rank else None,
    )


def samples_of(trainer: SFTTrainer) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids and labels of every sample that the trainer has made, taken out of its rows."""
    for row in trainer.train_dataset:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            yield row["input_ids"][start : start + length], row["labels"][start : start + length]
            start += length


def describe_boundaries(trainer: SFTTrainer, packs: bool) -> str:
    """Try whether a packed row's last document sees its first one, on the trainer's own rows and collator."""
    if not packs:
        return "one sample a row"
    rows = trainer.train_dataset.select(range(min(len(trainer.train_dataset), 100)))
    inputs = trainer.data_collator([max(rows, key=lambda row: len(row["seq_lengths"]))])
    inputs.pop("labels")
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 0] += 1
    whole = trainer.accelerator.unwrap_model(trainer.model)
    decoder = (whole.get_base_model() if isinstance(whole, PeftModel) else whole).model
    with torch.no_grad():
        last, last_changed = (decoder(**x, use_cache=False).last_hidden_state[0, -1] for x in (inputs, changed))
    seen = not torch.equal(last, last_changed)
    return "documents see each other" if seen else "documents apart, kept whole"


def main() -> None:
    job = load_job()
    steps = job.make_steps()
    trainer = make_trainer(job)
    losses = train(trainer, steps)
    seen = [0] + [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    steps.report(
        tokens=[int(after - before) for before, after in pairwise(seen)],
        losses=losses,
        packages=["torch", "transformers", "accelerate", "trl", "peft"],
        said={
            "num_trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "boundaries": describe_boundaries(trainer, packs=trainer.args.packing),
            "data": describe_samples(samples_of(trainer)),
        },
    )


if __name__ == "__main__":
    main()
