"""The runs that benchmarks/planner/cpu.py measures: settings and data of each, as different as runs on a CPU are.

Nothing of TernLM is fitted to any of them: `tern calibrate` knows none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ternlm.config import Config, config_from_dict
from ternlm.data.shards import ShardWriter, write_manifest
from ternlm.data.tokenizer import train_bpe


@dataclass(frozen=True)
class Shape:
    """One training run in float32."""

    name: str
    hidden: int
    layers: int
    heads: int
    inner: int
    vocab: int
    seq_len: int
    sequences: int = 1
    """Of a step."""
    microbatch: int = 1
    """Sequences."""
    kv_heads: int | None = None
    bias: bool = False
    tied: bool = False
    recompute: float = 0.0
    compile: str = "on"
    document: int | None = None
    """Mean length of packed documents (tokens); None: each row is one document."""


# Beside each: what it has that the others haven't. The planner was mended while looking at these.
SHAPES = (
    Shape("deep", 512, 6, 8, 1408, 8000, 512),  # blocks alone
    Shape("vocabulary", 384, 2, 6, 1024, 50000, 512),  # head and loss are most of it
    Shape("long", 384, 2, 6, 1024, 8000, 4096, kv_heads=2),  # attention over 4,096 tokens, grouped queries
    Shape("packed", 640, 3, 10, 1728, 16000, 1024, bias=True, document=180),
    Shape("narrow", 256, 6, 4, 768, 4000, 256, sequences=8, microbatch=4, recompute=1.0, tied=True),
    Shape("wide", 1024, 2, 8, 2816, 12000, 256, sequences=2, microbatch=1, tied=True),  # heads of 128
    Shape("short", 320, 8, 5, 896, 12000, 128, sequences=8, microbatch=8, bias=True, recompute=0.5),
    Shape("uncompiled", 448, 4, 7, 1216, 24000, 1024, document=300, compile="off"),
)
# Measured once, after the last change to the planner and to `tern calibrate`.
HELD_OUT = (
    Shape("mixed", 768, 3, 6, 2048, 30000, 768, sequences=2, microbatch=1, document=500),  # mapped logits, accumulated
    Shape("thin", 192, 10, 3, 512, 2000, 1024, sequences=2, microbatch=2),
    Shape("grouped", 896, 2, 14, 2432, 10000, 2048, kv_heads=2, bias=True, tied=True, document=700),
)


def make_config(shape: Shape, data: Path, out: Path, steps: int, threads: int) -> Config:
    """Return a run's settings; whatever isn't named is TernLM's default."""
    return config_from_dict(
        {
            "out": str(out),
            "model": {
                "vocab_size": shape.vocab,
                "hidden_size": shape.hidden,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads or shape.heads,
                "intermediate_size": shape.inner,
                "attention_bias": shape.bias,
                "tie_word_embeddings": shape.tied,
                "max_position_embeddings": shape.seq_len,
            },
            "data": {"seq_len": shape.seq_len, "sources": [{"name": "zipf", "path": str(data)}]},
            "batch": {"global_sequences": shape.sequences, "microbatch_sequences": shape.microbatch},
            "train": {"steps": steps},
            "compute": {
                "device": "cpu",
                "dtype": "float32",
                "threads": threads,
                "compile": shape.compile,
                "recompute": shape.recompute,
            },
            "checkpoint": {"every_steps": 0},
            "monitor": {"progress": "off", "jsonl": False},
        }
    )


def write_data(shape: Shape, folder: Path, steps: int) -> None:
    """Write a prepared data set: ids by Zipf's law, documents that fill a row or have log-normal lengths."""
    rng = np.random.default_rng(20231)
    total = max((steps + 2) * shape.sequences * shape.seq_len, 200_000)
    if shape.document is None:
        lengths = np.full(-(-total // shape.seq_len), shape.seq_len)
    else:
        drawn = shape.document * rng.lognormal(-0.32, 0.8, size=total // shape.document)  # mean of one
        lengths = drawn.round().clip(8, shape.seq_len).astype(np.int64)
    tokenizer = train_bpe(iter(["a stub"]), 260)  # the ids mean nothing
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    share = 1.0 / (np.arange(1, shape.vocab - 2) + 2.7)
    with ShardWriter(folder, "shard-00000", shape.vocab) as shard:
        for length in lengths:
            shard.add((3 + rng.choice(len(share), size=int(length), p=share / share.sum())).astype(np.uint32))
    about: dict[str, Any] = {"fingerprint": tokenizer.fingerprint, "vocab_size": shape.vocab}
    write_manifest(folder, [shard.close()], tokenizer=about, num_bytes=4 * int(lengths.sum()), options={})
