"""Models made ready for verbs that continue texts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ready(model: str, device: str, dtype: str, base: str | None) -> Iterator[tuple[Any, Any]]:
    """Give an opened model and its network, made for nothing but continuing texts, inside this context."""
    from ternlm.infer.fast import pack
    from ternlm.train.models import loaded

    with loaded(model, device, dtype, base) as (opened, network):
        yield opened, pack(network)


def room_for(network: Any, max_running: int) -> int:
    """Return for how many tokens' keys and values there is memory, as so many texts of a loaded model may need."""
    from ternlm.infer.fast import compute_dtype
    from ternlm.infer.memory import choose_num_tokens
    from ternlm.monitor.memory import free_memory

    device = network.model.norm.weight.device
    return choose_num_tokens(network.config, compute_dtype(network), max_running, free_memory(device), device.type)
