"""Times pieces of work against each other's noise: round after round, each a few times, with the median as answer.

On a machine that others use too, a sample during which the processor was taken away says nothing of the work: it is
left out as long as enough others are there. Knows nothing of what it times.
"""

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

MIN_SAMPLE_SECONDS = 2e-3
"""Shorter work is repeated within a sample, for the clock's sake."""

MIN_ROUNDS, MAX_ROUNDS = 3, 60


@dataclass
class Samples:
    """Seconds of one piece of work, sample by sample."""

    calm: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    """Those during which another process ran in this one's place."""

    @property
    def seconds(self) -> float:
        """Median of the calm ones; of all while fewer than three are calm."""
        return statistics.median(self.calm if len(self.calm) >= 3 else self.calm + self.disturbed)

    @property
    def count(self) -> int:
        """All samples."""
        return len(self.calm) + len(self.disturbed)


class Clock:
    """Times work on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples = self.disturbed = 0

    @property
    def disturbance(self) -> float:
        """Share of all samples so far during which the processor was taken away."""
        return self.disturbed / max(self.samples, 1)

    def measure(
        self, works: Mapping[str, Callable[[], object]], seconds: float, cold: bool = False
    ) -> dict[str, float]:
        """Return each work's median seconds, from rounds of all of them, in turns, for about `seconds`.

        cold: never repeat a work within a sample, so that it finds its operands where others have left them, as in
        training. Runs MIN_ROUNDS even if that takes longer. Each work is called once before, which isn't counted.
        """
        repeats = {name: 1 if cold else self._repeats(work) for name, work in works.items()}
        for work in works.values():
            self.time(work)
        found = {name: Samples() for name in works}
        end = time.perf_counter() + seconds
        for number in range(MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() > end:
                break
            for name in list(works) if number % 2 else reversed(list(works)):
                self._sample(works[name], repeats[name], found[name])
        return {name: samples.seconds for name, samples in found.items()}

    def _repeats(self, work: Callable[[], object]) -> int:
        self.time(work)
        return max(1, min(10_000, round(MIN_SAMPLE_SECONDS / max(self.time(work), 1e-7))))

    def _sample(self, work: Callable[[], object], repeats: int, samples: Samples) -> None:
        before = _times_displaced()
        seconds = self.time(work, repeats)
        displaced = self.device.type == "cpu" and _times_displaced() > before
        (samples.disturbed if displaced else samples.calm).append(seconds)
        self.samples += 1
        self.disturbed += displaced

    def time(self, work: Callable[[], object], repeats: int = 1) -> float:
        """Return the seconds that one of so many repeats takes on the device."""
        self.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self.synchronize()
        return (time.perf_counter() - began) / repeats

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _times_displaced() -> int:
    """Return how often this process's threads had to make way for others."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
