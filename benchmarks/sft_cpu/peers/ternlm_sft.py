"""TernLM by its public path: messages, settings, `open_sft`, `train_loop`.

The plain configuration is sparing with memory: rows of 512 tokens, a tenth of the blocks recomputed, few logits.
Variants: a number is the tokens of a row, without that; eager is the plain one with compile off. As many rows are
accumulated as make the same step.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from job import Job, describe_samples, load_job
from ternlm_steps import train

from ternlm.config.sft import SftConfig
from ternlm.data.batch import Batch
from ternlm.data.shards import ShardSet
from ternlm.train.run import set_up


def make_config(job: Job) -> SftConfig:
    """Return the run's settings; whatever isn't named is TernLM's default."""
    sparing = not job.variant.isdecimal()
    seq_len = 512 if sparing else int(job.variant)
    settings: dict[str, Any] = {
        "out": str(Path(job.scratch) / "run"),
        "seed": job.seed,
        "load": {"from": job.model},
        "data": {"path": str(Path(job.data) / "messages.jsonl"), "format": "messages", "seq_len": seq_len},
        "batch": {"global_sequences": job.seq_len // seq_len, "microbatch_sequences": 1},
        "train": {"steps": job.total_steps},
        "optimizer": {
            "lr": job.lr,
            "betas": job.betas,
            "weight_decay": job.weight_decay,
            "clip_norm": job.clip_norm,
        },
        "schedule": {"kind": "constant", "warmup_fraction": 0.0},
        "compute": {
            "device": "cpu",
            "dtype": "float32",
            "threads": job.threads,
            "compile": "off" if job.variant == "eager" else "on",
            "recompute": 0.1 if sparing else 0.0,
        },
        "loss": {"chunk_tokens": 64 if sparing else 0},
        "checkpoint": {"every_steps": 0},
    }
    if job.rank:
        settings["adapter"] = {"rank": job.rank, "alpha": float(job.alpha)}
    return SftConfig.model_validate(settings)


def run_ternlm(job: Job) -> None:
    """Fine-tune by TernLM and report the process's result."""
    from ternlm.post.sft import open_sft

    steps, tokens = job.make_steps(), []
    ready = open_sft(make_config(job))
    run = set_up(ready.config, resume="never", facts=ready.facts)
    with closing(run.loader):
        metrics = train(run, count_tokens(run.loader, tokens), steps)
    steps.report(
        tokens=tokens,
        losses=[step["loss/total"] for step in metrics],
        packages=["torch"],
        said={
            "num_trained": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
            "boundaries": "documents apart, kept whole",
            "data": describe_samples(samples_of(ShardSet.open(ready.config.data.sources[0].path))),
        },
    )


def samples_of(shards: ShardSet) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids and labels (-100: not learnt) of every sample, up to the end of its answer.

    The template's line break after it is a token more, which nothing learns.
    """
    for index in range(shards.num_documents):
        ids, trained = shards.document(index)
        end = int(trained.nonzero()[0][-1]) + 1
        labels = [token if learnt else -100 for token, learnt in zip(ids[:end].tolist(), trained[:end], strict=True)]
        yield ids[:end].tolist(), labels


def count_tokens(batches: Iterable[list[Batch]], tokens: list[int]) -> Iterator[list[Batch]]:
    """Pass the steps' batches on, and note in `tokens` how many real ones each has."""
    for microbatches in batches:
        tokens.append(sum(real_tokens(batch) for batch in microbatches))
        yield microbatches


def real_tokens(batch: Batch) -> int:
    """Count the tokens of each sample up to the end of its answer; padding has nothing to learn, and isn't counted."""
    count = 0
    for row, lengths in zip(batch.weights_BT, batch.lengths, strict=True):
        learnt = [part.nonzero() for part in row.split(lengths)]
        count += sum(int(places[-1]) + 2 for places in learnt if len(places))  # a weight is of the token that follows
    return count


if __name__ == "__main__":
    run_ternlm(load_job())
