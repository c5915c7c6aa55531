"""Loss on held-out data, by source, without gradients."""

from collections import Counter
from collections.abc import Mapping

import torch

from ternlm.train.metrics import loss_metrics
from ternlm.train.run import Run
from ternlm.train.step import read_losses


def validate(run: Run) -> dict[str, float]:
    """Return `validation_loss/NAME` and the like for each held-out set, over its same sequences each time.

    Of several sets also of all together, as `total`. Collective: every rank must call it.
    """
    metrics: dict[str, float] = {}
    total: Counter[str] = Counter()
    # Uncompiled: compiling the blocks once more, without gradients, would cost more than it saves.
    with torch.compiler.set_stance("force_eager"):
        for name, batches in run.held_out.items():
            losses = run.laid_out.evaluate(batches, run.loss_fn, run.autocast)
            sums = {key: sum(values) for key, values in read_losses(losses, run.laid_out, 1).metrics.items()}
            metrics |= loss_metrics(sums, name, prefix="validation_")
            total.update(sums)
    if len(run.held_out) > 1:
        metrics |= loss_metrics(total, "total", prefix="validation_")
    return metrics


def judge(run: Run, metrics: Mapping[str, float]) -> None:
    """Let the run take note of a validation: what `validation.patience` goes by."""
    name = "total" if len(run.held_out) > 1 else next(iter(run.held_out))
    loss = metrics.get(f"validation_loss/{name}")
    if loss is not None:
        run.progress.judge(loss)
