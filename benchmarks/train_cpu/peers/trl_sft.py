"""TRL's SFTTrainer on packed short documents (variants: plain = its default `bfd`, compile, wrapped)."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from hf_steps import train, training_arguments
from hf_trainer import build_llama
from record import Job, load_job
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


def documents(job: Job) -> Dataset:
    """Return the documents, already tokenized."""
    tokens, ends = np.load(job.tokens), np.load(job.ends)
    return Dataset.from_dict({"input_ids": [part.tolist() for part in np.split(tokens, ends[:-1])]})


def stub_tokenizer() -> PreTrainedTokenizerFast:
    """Return the least that SFTTrainer asks of a tokenizer; the documents are tokenized already."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def describe_boundaries(trainer: SFTTrainer) -> str:
    """Try whether a packed row's last document sees its first one, on the trainer's own rows and collator."""
    row = max((trainer.train_dataset[i] for i in range(len(trainer.train_dataset))), key=_num_documents)
    inputs = trainer.data_collator([row])
    inputs.pop("labels")
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 0] += 1
    with torch.no_grad():
        last, last_changed = (trainer.model.model(**x).last_hidden_state[0, -1] for x in (inputs, changed))
    seen = not torch.equal(last, last_changed)
    return "documents see each other, and are cut at row ends" if seen else "documents apart, kept whole"


def main() -> None:
    job = load_job()
    steps = job.make_steps()
    model = build_llama(job)
    packing: dict[str, Any] = {"packing": True, "max_length": job.seq_len}
    if job.variant == "wrapped":
        packing["packing_strategy"] = "wrapped"
    arguments = SFTConfig(**training_arguments(job, job.batch, compiled=job.variant == "compile"), **packing)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=documents(job), processing_class=stub_tokenizer())
    losses = train(trainer, steps)
    seen = [0] + [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    steps.report(
        tokens=[int(after - before) for before, after in pairwise(seen)],
        losses=losses,
        packages=["torch", "transformers", "accelerate", "trl"],
        said={"num_params": sum(p.numel() for p in model.parameters()), "boundaries": describe_boundaries(trainer)},
    )


def _num_documents(row: dict) -> int:
    return len(row.get("seq_lengths", ()))


if __name__ == "__main__":
    main()
