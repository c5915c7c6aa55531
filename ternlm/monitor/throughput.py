"""Speed of a run: tokens a second, TFLOPS, utilisation, waiting and time left, from the newest steps.

Fed once a step, it keeps nothing that a resumed run would need. What a step's operations are is counted by
`ternlm.planner.flops`, the device's peak found by `ternlm.monitor.peak`.
"""

from collections import deque
from dataclasses import fields
from typing import NamedTuple

from ternlm.planner.flops import Flops

_WINDOW = 50


class _Step(NamedTuple):
    tokens: int
    seconds: float
    flops: Flops
    wait_seconds: float


class Throughput:
    """Rates over the newest steps.

    peak_tflops: of one device, for MFU, which is left out where it is None. max_seconds: the run's time
    budget, if it has one.
    """

    def __init__(
        self,
        total_steps: int,
        num_devices: int = 1,
        peak_tflops: float | None = None,
        max_seconds: float | None = None,
    ) -> None:
        self._total_steps, self._num_devices = total_steps, num_devices
        self._peak_tflops, self._max_seconds = peak_tflops, max_seconds
        self._steps: deque[_Step] = deque(maxlen=_WINDOW)
        self._num_recorded = 0

    def record(self, tokens: int, seconds: float, flops: Flops, wait_seconds: float = 0.0) -> None:
        """Add a step.

        tokens, flops: of all devices together. seconds: the step's wall time, with the wait for its batch.
        """
        if seconds <= 0:
            raise ValueError(f"a step's seconds must be above 0, not {seconds}")
        self._steps.append(_Step(tokens, seconds, flops, wait_seconds))
        self._num_recorded += 1

    def metrics(self, step: int, elapsed_seconds: float) -> dict[str, float]:
        """Return the metrics `speed/*`, `data/*` and `time/*`; at least one step must be recorded.

        step: steps done. elapsed_seconds: spent of the budget, since the run began.
        """
        last = self._steps[-1]
        metrics = {
            "speed/tokens_per_s": self._tokens_per_second(1),
            "speed/tokens_per_s_10": self._tokens_per_second(10),
            "speed/tokens_per_s_50": self._tokens_per_second(50),
        }
        for convention in fields(Flops):
            operations = getattr(last.flops, convention.name)
            tflops = operations / last.seconds / self._num_devices / 1e12
            metrics[f"speed/tflops_{convention.name}"] = tflops
            if self._peak_tflops is not None:
                metrics[f"speed/mfu_{convention.name}"] = tflops / self._peak_tflops
        waited = sum(step.wait_seconds for step in self._steps)
        return {
            **metrics,
            "data/wait_ms": last.wait_seconds * 1000,
            "data/wait_share": waited / sum(step.seconds for step in self._steps),
            "time/step_s": last.seconds,
            "time/elapsed_s": elapsed_seconds,
            "time/eta_s": self._eta_seconds(step, elapsed_seconds),
        }

    def _tokens_per_second(self, newest: int) -> float:
        steps = list(self._steps)[-newest:]
        return sum(s.tokens for s in steps) / sum(s.seconds for s in steps) / self._num_devices

    def _eta_seconds(self, step: int, elapsed_seconds: float) -> float:
        # A process's first step compiles and warms up; it says little about the next ones.
        steps = list(self._steps)
        steps = steps[1:] if 1 < self._num_recorded <= _WINDOW else steps
        eta = (self._total_steps - step) * sum(s.seconds for s in steps) / len(steps)
        if self._max_seconds is not None:
            eta = min(eta, self._max_seconds - elapsed_seconds)
        return max(eta, 0.0)
