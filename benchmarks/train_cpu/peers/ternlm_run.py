"""TernLM by its public path: token shards, settings, `set_up`, `train_loop` (variant eager: compile off).

The loop reports every step to a sink that marks its end.
"""

from contextlib import closing
from pathlib import Path

import numpy as np
from record import Job, load_job
from ternlm_steps import train

from ternlm.config import Config
from ternlm.data.shards import ShardWriter, write_manifest
from ternlm.data.tokenizer import train_bpe
from ternlm.train.run import set_up


def write_shards(job: Job, folder: Path) -> None:
    """Write the documents as a prepared data set; its tokenizer is a stub, the ids mean nothing."""
    folder.mkdir()
    tokenizer = train_bpe(iter(["a stub"]), 260)
    tokenizer.save(folder)
    tokens, ends = np.load(job.tokens), np.load(job.ends)
    with ShardWriter(folder, "shard-00000", job.shape.vocab_size) as shard:
        for document in np.split(tokens, ends[:-1]):
            shard.add(document)
    said = {"fingerprint": tokenizer.fingerprint, "vocab_size": job.shape.vocab_size}
    write_manifest(folder, [shard.close()], tokenizer=said, num_bytes=len(tokens), options={})


def make_config(job: Job, data: Path, out: Path) -> Config:
    """Return the run's settings; whatever isn't named is TernLM's default."""
    shape = job.shape
    return Config.model_validate(
        {
            "out": str(out),
            "seed": job.seed,
            "model": {
                "vocab_size": shape.vocab_size,
                "hidden_size": shape.hidden_size,
                "num_hidden_layers": shape.num_layers,
                "num_attention_heads": shape.num_heads,
                "intermediate_size": shape.intermediate_size,
                "attention_bias": True,
                "rms_norm_eps": shape.rms_norm_eps,
                "rope_theta": shape.rope_theta,
                "max_position_embeddings": job.seq_len,
            },
            "data": {"seq_len": job.seq_len, "sources": ({"name": "bench", "path": str(data)},)},
            "batch": {"global_sequences": job.batch, "microbatch_sequences": job.batch},
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
            },
            "checkpoint": {"every_steps": 0},
        }
    )


def main() -> None:
    job = load_job()
    steps = job.make_steps()
    scratch = Path(job.scratch)
    write_shards(job, scratch / "data")
    run = set_up(make_config(job, scratch / "data", scratch / "run"), resume="never")
    with closing(run.loader):
        metrics = train(run, run.loader, steps)
    steps.report(
        tokens=[job.batch * job.seq_len] * job.total_steps,
        losses=[step["loss/total"] for step in metrics],
        packages=["torch"],
        said={
            "num_params": sum(p.numel() for p in run.model.parameters()),
            "boundaries": "documents apart, cut at row ends" if job.packed else "one document a row",
        },
    )


if __name__ == "__main__":
    main()
