"""Names for stretches of a step in a profiler's trace, where operators alone don't tell what they are for."""

from torch.profiler import record_function

OPTIMIZER = "optimizer"
"""Norm, clipping and update."""


def exchange(operation: str, axis: str) -> record_function:
    """Return a range around a collective and the wait for it, for `with`; costs about a microsecond."""
    return record_function(f"{operation} over {axis}")
