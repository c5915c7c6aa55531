"""Loss on held-out data, by source, without gradients."""

import torch

from ternlm.train.metrics import loss_metrics
from ternlm.train.run import Run
from ternlm.train.step import read_losses


def validate(run: Run) -> dict[str, float]:
    """Return `validation_loss/NAME` and the like for each held-out set, over its same sequences each time.

    Collective: every rank must call it.
    """
    metrics: dict[str, float] = {}
    # Uncompiled: compiling the blocks once more, without gradients, would cost more than it saves.
    with torch.compiler.set_stance("force_eager"):
        for name, batches in run.held_out.items():
            losses = run.laid_out.evaluate(batches, run.loss_fn, run.autocast)
            sums = {key: sum(values) for key, values in read_losses(losses, run.laid_out, 1).metrics.items()}
            metrics |= loss_metrics(sums, name, prefix="validation_")
    return metrics
