"""What every measured process shares: marking the end of each step, printing one JSON line.

Standard library only, since it is imported in each peer's own environment. Linux only (peak memory is read from /proc).
"""

import json
import math
import os
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

PREFIX = "RESULT "


class Steps:
    """The ends of a process's optimizer steps, `warmup` before `timed` ones, with its peak memory so far.

    A step lasts from the end of the one before to its own end, so that reading its batch counts.
    """

    def __init__(self, config: str, warmup: int, timed: int) -> None:
        self.config = config
        self.warmup = warmup
        self.total = warmup + timed
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []
        self.first_step_end_seconds = 0.0
        self.peak_rss_bytes = 0

    def mark(self) -> None:
        """Note that a step has ended; marks after the last timed step are ignored."""
        if len(self.ends) < self.total:
            if not self.ends:
                self.first_step_end_seconds = _process_age_seconds()
            self.ends.append(time.perf_counter())
            self.cpu_ends.append(time.process_time())
            self.peak_rss_bytes = _peak_rss_bytes()

    def report(self, *, tokens: list[int], losses: list[float], packages: list[str], said: dict[str, Any]) -> None:
        """Print the process's result.

        tokens: real tokens (no padding) of every step; losses: of every step, in nats; packages: whose versions matter;
        said: what else the benchmark's report says of this process.
        """
        counts = {"marks": len(self.ends), "token counts": len(tokens), "losses": len(losses)}
        for name, count in counts.items():
            if count != self.total:
                raise RuntimeError(f"{self.config}: {count} {name} for {self.total} steps")
        if not all(math.isfinite(loss) for loss in losses):
            raise RuntimeError(f"{self.config}: a loss is not finite: {losses}")
        seconds = [end - start for start, end in pairwise(self.ends[self.warmup - 1 :])]
        cpu_seconds = [end - start for start, end in pairwise(self.cpu_ends[self.warmup - 1 :])]
        rates = sorted(n / s for n, s in zip(tokens[self.warmup :], seconds, strict=True))
        result = {
            "name": self.config,
            "tokens_per_s": _median(rates),
            "step_seconds": seconds,
            "step_cpu_seconds": cpu_seconds,
            "step_tokens": tokens[self.warmup :],
            "first_step_end_seconds": self.first_step_end_seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "losses": losses,
            **said,
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
