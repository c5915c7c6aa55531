"""Whether a step's loss looks healthy. Non-finite gradients are the optimizer step's own business."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from ternlm.config.training import TrainConfig

Verdict = Literal["ok", "skip", "stop"]


class SpikeRule:
    """Judge each step's loss against the mean of the newest healthy ones, by `train.spike` and its ratio.

    A loss that spiked doesn't enter the mean; a lasting jump is therefore a run of spikes, which
    `train.max_skipped_in_row` ends.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._action, self._ratio = config.spike, config.spike_ratio
        self._losses: deque[float] = deque(maxlen=config.spike_window)

    def judge(self, loss: float) -> Verdict:
        """Return what to do with the step: apply it, skip its update, or stop.

        No spike is seen before the window is full. A loss that isn't finite gives gradients that aren't,
        and is left to that check.
        """
        if self._action == "off" or not math.isfinite(loss):
            return "ok"
        full = len(self._losses) == self._losses.maxlen
        if full and loss > self._ratio * math.fsum(self._losses) / len(self._losses):
            return self._action
        self._losses.append(loss)
        return "ok"

    def state_dict(self) -> dict[str, Any]:
        """Return the window's losses for a checkpoint."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; a window that has become shorter keeps the newest losses."""
        self._losses.clear()
        self._losses.extend(state["losses"])
