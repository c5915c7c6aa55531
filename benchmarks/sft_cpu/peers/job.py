"""What every measured process of this benchmark shares: its job, and what it says of its samples.

Standard library only, since it is imported in each peer's own environment.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steps import Steps


@dataclass(frozen=True)
class Job:
    """What one process is to run. `model` is a Hugging Face folder, `data` the folder that data.py writes."""

    config: str
    model: str
    data: str
    scratch: str
    warmup: int
    steps: int
    threads: int
    rank: int
    """Of the adapters; 0: all weights are trained."""
    lr: float
    alpha: int = 32
    seq_len: int = 2048
    """Tokens of a row, for what packs; a row is a step."""
    samples: int = 10
    """Samples of a step, for what doesn't pack: about as many tokens."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
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

    def make_steps(self) -> Steps:
        """Return what the ends of the steps are noted in."""
        return Steps(self.config, self.warmup, self.steps)


def load_job() -> Job:
    """Read the job named by the command line and give this process its number of threads."""
    fields = json.loads(Path(sys.argv[1]).read_text())
    fields["betas"] = tuple(fields["betas"])
    job = Job(**fields)
    import torch

    torch.set_num_threads(job.threads)
    return job


def describe_samples(samples: Iterable[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Return counts and a digest of (ids, labels; -100: not learnt) in any order, to show that all train the same."""
    digests, num_tokens, num_learnt = [], 0, 0
    for ids, labels in samples:
        learnt = [label != -100 for label in labels]
        digests.append(hashlib.sha256(json.dumps([ids, learnt]).encode()).hexdigest())
        num_tokens += len(ids)
        num_learnt += sum(learnt)
    digest = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]
    return {"samples": len(digests), "tokens": num_tokens, "learnt_tokens": num_learnt, "digest": digest}
