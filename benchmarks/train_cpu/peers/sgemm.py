"""The machine's float32 matrix-product peak at the job's number of threads: the best of a few square sizes."""

import json
import statistics
import time

import torch
from record import load_job
from steps import PREFIX

SIZES = (1024, 2048, 4096)
REPEATS = 7


def measure_flops(size: int) -> float:
    """Return the median FLOP/s of `size` x `size` products."""
    left, right, out = (torch.rand(size, size) for _ in range(3))
    torch.mm(left, right, out=out)
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> None:
    job = load_job()
    by_size = {size: measure_flops(size) for size in SIZES}
    result = {"name": job.config, "flops_per_s": max(by_size.values()), "by_size": by_size}
    print(PREFIX + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
