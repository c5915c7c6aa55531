"""Loss scaling for float16 gradients, by the rules of InternLM's trainer."""

from dataclasses import dataclass


@dataclass
class LossScaler:
    """Scale that doubles after 1,000 clean updates and halves on overflow, once the overflows outrun the hysteresis.

    The count of overflows is reset only when the scale grows.
    """

    scale: float = 2.0**16
    clean: int = 0
    overflows: int = 0
    growth_interval: int = 1000
    hysteresis: int = 2
    min_scale: float = 1.0
    max_scale: float = 2.0**24

    def update(self, overflow: bool) -> None:
        """Take note of one step."""
        if overflow:
            self.clean = 0
            self.overflows += 1
            if self.overflows >= self.hysteresis:
                self.scale = max(self.scale / 2, self.min_scale)
            return
        self.clean += 1
        if self.clean == self.growth_interval:
            self.clean = self.overflows = 0
            self.scale = min(self.scale * 2, self.max_scale)

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs."""
        return {"scale": self.scale, "clean": self.clean, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state."""
        self.scale = float(state["scale"])
        self.clean, self.overflows = int(state["clean"]), int(state["overflows"])
