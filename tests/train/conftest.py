"""A small prepared data set of arithmetic progressions, which a tiny model learns in a few steps."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ternlm.config import Config, config_from_dict
from ternlm.data.shards import ShardWriter, write_manifest

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))  # where `ranks` and `started` are

VOCAB = 64


def _write_data(folder, seed=0, documents=120, fingerprint="f"):
    """Documents of 5 to 60 tokens: 0, then a start and a step that foretell the rest."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, "shard-00000", VOCAB) as shard:
        for _ in range(documents):
            start, step, length = rng.integers(1, VOCAB), rng.integers(1, 4), rng.integers(5, 60)
            shard.add([0, *(1 + (start + step * np.arange(length)) % (VOCAB - 1))])
    tokenizer = {"fingerprint": fingerprint, "vocab_size": VOCAB}
    write_manifest(folder, [shard.close()], tokenizer=tokenizer, num_bytes=0, options={})
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return _write_data(tmp_path_factory.mktemp("data") / "numbers")


@pytest.fixture
def write_data():
    """The writer of such data: `(folder, seed=0, documents=120, fingerprint="f") -> folder`."""
    return _write_data


@pytest.fixture
def make_config(tmp_path, data_folder, monkeypatch):
    """Build a config of a tiny run; sections given as keywords are merged over the defaults."""
    monkeypatch.setattr("ternlm.train.run.find_tokenizer", lambda data: None)  # these data have no text behind them

    def make(out="run", **sections) -> Config:
        settings = {
            "out": str(tmp_path / out),
            "model": dict(
                vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=64, attention_bias=True, max_position_embeddings=64,
                init={"kind": "plain"},
            ),
            "data": {"seq_len": 32, "sources": [{"name": "numbers", "path": str(data_folder)}]},
            "batch": {"global_sequences": 8, "microbatch_sequences": 4},
            "train": {"steps": 6},
            "optimizer": {"lr": 1e-2},
            # Equalities hold in float32; `auto` is bfloat16 on a CPU that is fast at it.
            "compute": {"device": "cpu", "dtype": "float32", "compile": "off", "threads": 1, "peak_tflops": 0.1},
            "monitor": {"progress": "off"},
        }  # fmt: skip
        for name, values in sections.items():
            settings[name] = {**settings.get(name, {}), **values} if isinstance(values, dict) else values
        return config_from_dict(settings)

    return make
