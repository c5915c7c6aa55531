"""The microbatch that training, validation and losses take: B packed sequences of T tokens.

`pack` makes the rows, `loader` stacks them into a Batch; the model, the attention and the loss read it. It
holds tensors and how they were packed, nothing about where they came from but the source's name.

Shapes: B sequences, T tokens of a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One microbatch. The label rule: target t is token t + 1 of the same document."""

    tokens_BT: Tensor
    """Ids, int64."""
    targets_BT: Tensor
    """The id to be predicted at each token, int64; 0 where the weight is 0."""
    weights_BT: Tensor
    """How much each target counts, float32: 1 trained, 0 not."""
    positions_BT: Tensor
    """Place of each token for the position embedding, int64; 0 at the start of each segment."""
    lengths: tuple[tuple[int, ...], ...]
    """Per row, the lengths (tokens) of the consecutive segments attention may not cross; they sum to T."""
    types_B: Tensor
    """Which source each row is from, int64, an index into `names`."""
    names: tuple[str, ...]
    """Names of the sources, the data types of the metrics."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return this batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin(self) -> "Batch":
        """Return this batch in page-locked memory: copies to a CUDA device can then overlap computation."""
        return self._map(Tensor.pin_memory)

    def segment_lengths_BT(self) -> Tensor:
        """Return the length of the segment that each token is in, int64, on the host."""
        rows = [torch.tensor(row) for row in self.lengths]
        return torch.stack([row.repeat_interleave(row, output_size=self.tokens_BT.shape[1]) for row in rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            tokens_BT=change(self.tokens_BT),
            targets_BT=change(self.targets_BT),
            weights_BT=change(self.weights_BT),
            positions_BT=change(self.positions_BT),
            types_B=change(self.types_B),
        )
