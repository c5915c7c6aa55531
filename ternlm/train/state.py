"""How far a run has come: the few numbers that are saved beside its tensors."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """Counts since the run began, over all its restarts."""

    step: int = 0
    """Batches drawn."""
    updates: int = 0
    """Updates applied; the learning rate follows these."""
    tokens: int = 0
    """Tokens of the batches trained on, padding included."""
    skipped: int = 0
    """Steps whose update was not applied (non-finite gradients, or a spike)."""
    skipped_in_row: int = 0
    """How many of the newest steps were skipped."""
    seconds: float = 0.0
    """Time spent in the training loop, validation and saving included."""
    best_loss: float | None = None
    """Least held-out loss (nats per token) so far."""
    best_step: int = 0
    """The step after which it was found."""
    worse_in_row: int = 0
    """Validations since."""

    def judge(self, held_out_loss: float) -> None:
        """Take note of a validation after the newest step."""
        if math.isfinite(held_out_loss) and (self.best_loss is None or held_out_loss < self.best_loss):
            self.best_loss, self.best_step, self.worse_in_row = held_out_loss, self.step, 0
        else:
            self.worse_in_row += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the counts for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Progress":
        """Go on from a checkpoint's counts."""
        return cls(**state)
