"""What every measured process of this benchmark shares: the model's shape, and its job.

Standard library only, since it is imported in each peer's own environment.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from steps import Steps


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

    def make_steps(self) -> Steps:
        """Return what the ends of the steps are noted in."""
        return Steps(self.config, self.warmup, self.steps)


def load_job() -> Job:
    """Read the job named by the command line and give this process its number of threads."""
    fields = json.loads(Path(sys.argv[1]).read_text())
    fields["shape"] = Shape(**fields["shape"])
    fields["betas"] = tuple(fields["betas"])
    job = Job(**fields)
    import torch

    torch.set_num_threads(job.threads)
    return job
