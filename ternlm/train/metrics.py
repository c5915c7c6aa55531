"""Sums of a loss function turned into the metrics that people read."""

import math
from collections.abc import Mapping


def loss_metrics(sums: Mapping[str, float], name: str, prefix: str = "") -> dict[str, float]:
    """Return loss, perplexity, accuracy and, where bytes were counted, bits per byte of data type `name`.

    sums: `nll` (nats), `tokens`, `correct` and perhaps `bytes`; empty where there are no tokens.
    """
    tokens = sums["tokens"]
    if not tokens:
        return {}
    loss = sums["nll"] / tokens
    metrics = {
        f"{prefix}loss/{name}": loss,
        f"{prefix}perplexity/{name}": math.exp(min(loss, 700.0)),
        f"{prefix}accuracy/{name}": sums["correct"] / tokens,
    }
    if sums.get("bytes"):
        metrics[f"{prefix}bpb/{name}"] = sums["nll"] / math.log(2) / sums["bytes"]
    return metrics
