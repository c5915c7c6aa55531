"""What `run.py` and the process that measures tell each other."""

from dataclasses import dataclass

PREFIX = "RESULT "
OUT_OF_MEMORY = 3
"""Exit code of a process whose model did not fit."""


@dataclass(frozen=True)
class Job:
    """What one process is to run."""

    preset: str
    layers: int
    device: str
    dtype: str
    seq_len: int
    microbatch: int
    accumulate: int
    recompute: float
    recompute_keep: str
    compile: str
    warmup: int
    steps: int
    profiled: int
    scratch: str

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.microbatch * self.accumulate * self.seq_len
