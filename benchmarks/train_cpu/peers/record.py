"""What every measured process shares: reading its job, marking the end of each step, printing one JSON line.

Standard library only, since it is imported in each peer's own environment. Linux only (peak memory is read from /proc).
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

PREFIX = "RESULT "


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: untied head, biases on q, k, v and o, as many key/value heads as query heads."""

    vocab_size: int
    hidden_size: int = 512
    num_layers: int = 12
    num_heads: int = 8
    intermediate_size: int = 1408
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


@dataclass(frozen=True)
class Job:
    """What one process is to run. `tokens` and `ends` are .npy files: the documents' ids and their end offsets."""

    config: str
    shape: Shape
    batch: int
    seq_len: int
    warmup: int
    steps: int
    threads: int
    tokens: str
    ends: str
    scratch: str
    packed: bool
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 1

    @property
    def total_steps(self) -> int:
        """Warm-up and timed steps."""
        return self.warmup + self.steps

    @property
    def variant(self) -> str:
        """What follows the configuration's first hyphen, such as `compile`; empty for the plain one."""
        return self.config.partition("-")[2]

    def save(self, path: Path) -> None:
        """Write the job for the process that is to run it."""
        path.write_text(json.dumps(asdict(self)))


def load_job() -> Job:
    """Read the job named by the command line and give this process its number of threads."""
    fields = json.loads(Path(sys.argv[1]).read_text())
    fields["shape"] = Shape(**fields["shape"])
    fields["betas"] = tuple(fields["betas"])
    job = Job(**fields)
    import torch

    torch.set_num_threads(job.threads)
    return job


class Steps:
    """The ends of a process's optimizer steps, with its peak memory so far.

    A step lasts from the end of the one before to its own end, so that reading its batch counts.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ends: list[float] = []
        self.first_step_end_seconds = 0.0
        self.peak_rss_bytes = 0

    def mark(self) -> None:
        """Note that a step has ended; marks after the last timed step are ignored."""
        if len(self.ends) < self.job.total_steps:
            if not self.ends:
                self.first_step_end_seconds = _process_age_seconds()
            self.ends.append(time.perf_counter())
            self.peak_rss_bytes = _peak_rss_bytes()

    def report(
        self, *, tokens: list[int], losses: list[float], num_params: int, boundaries: str, packages: list[str]
    ) -> None:
        """Print the process's result.

        tokens: real tokens (no padding) of every step; losses: of every step, in nats;
        boundaries: how documents that share a row are treated.
        """
        job = self.job
        counts = {"marks": len(self.ends), "token counts": len(tokens), "losses": len(losses)}
        for name, count in counts.items():
            if count != job.total_steps:
                raise RuntimeError(f"{job.config}: {count} {name} for {job.total_steps} steps")
        if not all(math.isfinite(loss) for loss in losses):
            raise RuntimeError(f"{job.config}: a loss is not finite: {losses}")
        timed = self.ends[job.warmup - 1 :]
        seconds = [end - start for start, end in pairwise(timed)]
        rates = sorted(n / s for n, s in zip(tokens[job.warmup :], seconds, strict=True))
        result = {
            "name": job.config,
            "tokens_per_s": _median(rates),
            "step_seconds": seconds,
            "step_tokens": tokens[job.warmup :],
            "first_step_end_seconds": self.first_step_end_seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "losses": losses,
            "num_params": num_params,
            "boundaries": boundaries,
            "versions": {name: version(name) for name in packages},
        }
        print(PREFIX + json.dumps(result), flush=True)


def _median(ordered: list[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _process_age_seconds() -> float:
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def _peak_rss_bytes() -> int:
    # Not getrusage: its high-water mark survives exec, so that it may be the parent's.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; peak memory can't be read on this system")
