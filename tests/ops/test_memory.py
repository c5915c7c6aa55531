"""What is kept of shapes that were met: little, or long runs would outgrow their machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

_GROWTH = """
import random, torch
from ternlm.ops.attention import make_segment_attend
from ternlm.ops.loss import chunked_cross_entropy

torch.set_num_threads(1)
rng = random.Random(0)
head = torch.randn(8192, 256).bfloat16()

def step():
    cuts = sorted(rng.sample(range(1, 512), 3))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, 512])]
    q, k, v = (torch.randn(1, 512, 4, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = make_segment_attend([lengths], torch.device("cpu"))(q, k, v, 0)
    weights = (torch.rand(512) < rng.uniform(0.2, 0.9)).float()
    loss = chunked_cross_entropy(out.flatten(2)[0], head, torch.randint(8192, (512,)), weights, chunk_tokens=4096)
    loss.total.backward()

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

for _ in range(25):
    step()
before = resident()
for _ in range(125):
    step()
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_bf16"), reason="bfloat16 is emulated here")
def test_memory_doesnt_grow_by_every_length_that_documents_have() -> None:
    code, root = [sys.executable, "-c", _GROWTH], Path(__file__).parents[2]
    done = subprocess.run(code, capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150  # MiB; 510 where all shapes are kept
