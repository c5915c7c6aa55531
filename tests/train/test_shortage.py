"""Memory that runs out in a real run: an address space too small, in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch
from started import write_data, write_recipe

from ternlm.config import AdapterConfig, ModelConfig
from ternlm.model.decoder import build_empty_model
from ternlm.model.linear import adapt
from ternlm.train.shortage import find_shortage, frozen_weights

# `tern` under a limit of so many MiB beyond what its libraries take.
LIMITED = """
import resource, sys
import torch
import ternlm.train.pretrain
from ternlm.cli import main
torch.set_num_threads(1)
torch.ones(256, 256) @ torch.ones(256, 256)
(size,) = (int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:"))
limit = size * 1024 + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv[1:] = sys.argv[2:]
main()
"""
LONG = ["data.seq_len=1024", "model.max_position_embeddings=1024", "model.hidden_size=128", "compute.dtype=float32"]
BATCH = ["batch.global_sequences=64", "batch.microbatch_sequences=64"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shortage")
    return write_recipe(folder / "run", write_data(folder), steps=1)


def train(recipe, mebibytes, *overrides):
    command = [sys.executable, "-c", LIMITED, str(mebibytes), "train", str(recipe), *LONG, *BATCH, *overrides]
    # Left alone, the C library raises the size from which it gives freed blocks back, and holds the rest.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_outgrows_memory_says_what_held_it_and_what_would_fit(recipe):
    done = train(recipe, 1000)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    before, _, report = done.stderr.partition("error: memory ran out on rank 0 in step 1; ")
    assert "is predicted to need" in before, done.stderr  # it was told before the first step, too
    assert "activations, logits, gathered weights and buffers" in report
    changes = report.partition("the cheapest changes that fit, the fastest first")[2].splitlines()[1:]
    assert len(changes) == 3
    # The first of them is typed, and the run gets through under the same limit.
    typed = changes[0].split("  (")[0].split()
    again = train(recipe, 1000, *typed)
    assert again.returncode == 0, again.stderr
    assert "the last step is done" in again.stderr


def test_what_is_a_shortage_and_what_isnt():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("NCCL WARN Cuda failure 2 'out of memory'"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        caught.value,
    ):
        assert find_shortage(error) is error
        with pytest.raises(RuntimeError) as wrapped:
            _wrap(error)
        assert find_shortage(wrapped.value) is error
    assert find_shortage(RuntimeError("shapes don't match")) is None
    assert find_shortage(ValueError("DefaultCPUAllocator: can't allocate memory")) is None
    assert find_shortage(None) is None


@pytest.mark.parametrize(("base", "bits"), [("bfloat16", 16), ("nf4", 4.5)])
def test_frozen_weights_are_held_too(base, bits):
    config, adapter = ModelConfig(preset="tiny"), AdapterConfig(base=base)
    model = build_empty_model(config, torch.device("cpu"), lambda empty: adapt(empty, adapter, torch.bfloat16))
    matrices = config.num_hidden_layers * (4 * 64 * 64 + 3 * 64 * 256)
    held = sum(tensor.nbytes for tensor in frozen_weights(model))
    assert held == matrices * bits / 8 + 2 * (config.num_params - matrices)


def _wrap(error):
    """Raise it as PyTorch's pipeline does."""
    try:
        raise error
    except Exception as cause:
        raise RuntimeError("failed to run forward: args: (4, 32, 64)") from cause
