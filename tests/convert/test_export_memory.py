"""An export to Hugging Face's format holds one file's tensors at a time, and no more than a tensor beside."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import random_model, small_config
from in_memory import Held

from ternlm.convert.export_hf import export_hf

SHARD_BYTES = 60_000


class Watched(Held):
    """Tells how many bytes of what was read were alive at a time, at most."""

    alive = most = 0

    def read(self, name: str, offset: Any = None, shape: Any = None) -> torch.Tensor:
        tensor = super().read(name, offset, shape).clone()
        self.alive += tensor.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self.let_go, tensor.nbytes)
        return tensor

    def let_go(self, num_bytes: int) -> None:
        self.alive -= num_bytes


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_one_files_tensors_are_held(tmp_path: Path, dtype: str) -> None:
    model = random_model(small_config(num_hidden_layers=4))
    watched = Watched(model.weights.tensors)  # type: ignore[attr-defined]
    export_hf(replace(model, weights=watched), tmp_path / "out", dtype, shard_bytes=SHARD_BYTES)
    largest = max(tensor.nbytes for tensor in watched.tensors.values())
    assert largest > SHARD_BYTES  # a file of its own
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert watched.most <= largest + SHARD_BYTES
