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


def room_for(network: Any, max_running: int, wanted: int | None = None) -> int:
    """Return for how many tokens' keys and values there is memory, as so many texts of a loaded model may need.

    wanted: tokens that it is to be; raises ConfigError where there is too little memory.
    """
    from ternlm.infer.fast import compute_dtype
    from ternlm.infer.memory import check_num_tokens, choose_num_tokens
    from ternlm.monitor.memory import free_memory

    device, dtype = network.model.norm.weight.device, compute_dtype(network)
    if wanted is None:
        return choose_num_tokens(network.config, dtype, max_running, free_memory(device), device.type)
    return check_num_tokens(network.config, dtype, wanted, free_memory(device))
