"""A program's operators, collectives and memory in their order, as a trace that Perfetto (ui.perfetto.dev) opens.

Times are nominal: operations and bytes over stated rates, with nothing waiting for a collective. They give the eye a
scale and say what could overlap; they are no prediction.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ternlm.planner.traffic import Traffic


@dataclass(frozen=True)
class NominalRates:
    """What the trace divides by, per second: an A100's data sheet, and a 200 Gbit/s network card for each device."""

    flops: float = 312e12
    memory_bytes: float = 2.0e12
    bytes_in_node: float = 300e9
    bytes_between_nodes: float = 25e9


class Timeline(TorchDispatchMode):
    """While active, lets its clock run by each operator's work.

    flops: of operators that PyTorch has no formula for, by qualified name; given the operator's arguments.
    """

    def __init__(self, rates: NominalRates, flops: Mapping[str, Callable[..., float]] | None = None) -> None:
        super().__init__()
        self.rates = rates
        self.seconds = 0.0
        self.flops = 0.0
        """Operations of matrix products and attention so far."""
        self._own_flops = flops or {}
        self._events: list[dict[str, Any]] = []
        self._tracks: dict[str, int] = {}
        self._busy: dict[str, float] = {}
        self._compute_since = 0.0
        self._phase: tuple[str | None, float] = (None, 0.0)
        self._sampled = 0

    def clear(self) -> None:
        """Forget everything up to now."""
        self._events.clear()
        self._busy.clear()
        self.seconds = self.flops = self._compute_since = 0.0
        self._phase = (None, 0.0)
        self._sampled = 0

    def phase(self, name: str | None) -> None:
        """Show what follows as one span, up to the next call; None: nothing follows."""
        self._end_compute()
        begun, self._phase = self._phase, (name, self.seconds)
        if begun[0]:
            self._span("program", begun[0], begun[1], self.seconds - begun[1], {})

    def collective(self, traffic: Traffic) -> None:
        """Show a collective that starts now, or when the one before on its axis ends."""
        self._end_compute()
        track = f"{traffic.axis} ({'between nodes' if traffic.between_nodes else 'inside a node'})"
        rate = self.rates.bytes_between_nodes if traffic.between_nodes else self.rates.bytes_in_node
        started, seconds = max(self.seconds, self._busy.get(track, 0.0)), traffic.sent_bytes / rate
        self._busy[track] = started + seconds
        figures = {"payload_bytes": traffic.payload_bytes, "sent_bytes": traffic.sent_bytes, "ranks": traffic.ranks}
        self._span(track, traffic.operation, started, seconds, figures)

    def memory(self, by_kind: Mapping[str, int]) -> None:
        """Show live bytes by kind, where they have changed visibly."""
        total = sum(by_kind.values())
        if abs(total - self._sampled) < total / 1000:
            return
        self._sampled = total
        self._events.append({"ph": "C", "name": "memory", "pid": 0, "ts": self._now, "args": dict(by_kind)})

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write the trace as JSON. about: what a reader should know of the program, put beside the rates."""
        self.phase(None)
        names = [_name("process_name", 0, "one rank; times are nominal, see otherData")]
        names += [_name("thread_name", track, name) for name, track in self._tracks.items()]
        trace = {
            "traceEvents": names + self._events,
            "displayTimeUnit": "ms",
            "otherData": {**about, "rates_per_second": asdict(self.rates)},
        }
        path.write_text(json.dumps(trace), encoding="utf-8")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operator, and let the clock run by the larger of its operations' time and its bytes' time."""
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if isinstance(func, OpOverload) and not func.is_view and func.namespace not in ("c10d", "_c10d_functional"):
            flops = self._flops_of(func, args, kwargs or {}, result)
            moved = sum(t.numel() * t.element_size() for t in tree_leaves((args, result)) if isinstance(t, Tensor))
            self.flops += flops
            self.seconds += max(flops / self.rates.flops, moved / self.rates.memory_bytes)
        return result

    @property
    def _now(self) -> float:
        return self.seconds * 1e6

    def _flops_of(self, func: OpOverload, args: tuple, kwargs: dict[str, Any], result: Any) -> float:
        own = self._own_flops.get(func._schema.name)
        if own is not None:
            return own(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        return formula(*args, **kwargs, out_val=result) if formula else 0.0

    def _end_compute(self) -> None:
        if self.seconds > self._compute_since:
            self._span("compute", "compute", self._compute_since, self.seconds - self._compute_since, {})
        self._compute_since = self.seconds

    def _span(self, track: str, name: str, started: float, seconds: float, figures: dict[str, Any]) -> None:
        number = self._tracks.setdefault(track, len(self._tracks))
        span = {"ph": "X", "name": name, "pid": 0, "tid": number, "ts": started * 1e6, "dur": seconds * 1e6}
        self._events.append({**span, "args": figures} if figures else span)


def _name(kind: str, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": 0, "tid": track, "args": {"name": name}}
