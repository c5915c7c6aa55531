"""What a training step's time went to, by the parts that the planner predicts, from PyTorch's profiler.

On a CPU the thread that trains is followed: an operator's own time goes to its part, and time in none to waiting. On
CUDA a moment belongs to the kernel that runs; to a collective only where nothing else runs, so that what is hidden
doesn't count. What is exchanged outside PyTorch's own wrappers is told by ranges of `ternlm.parallel.spans`.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ternlm.monitor.collectives import axis_names
from ternlm.parallel.mesh import Mesh
from ternlm.parallel.spans import OPTIMIZER
from ternlm.planner.traffic import world_axis

_STEP = "ternlm step"
_MATMULS = re.compile(r"aten::(mm|addmm_?|bmm|baddbmm_?|mv|_scaled_mm|_grouped_mm)$|mkldnn.*linear")
_ATTENTION = re.compile(r"attention|attn|sdpa|fmha", re.IGNORECASE)
_EXCHANGE = re.compile(r"\w+ over \w+$")
_CPU, _LAUNCH = ("cpu_op", "user_annotation"), ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class StepProfile:
    """Profiles one step at a time on this rank."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._profile: profile | None = None
        self._range: record_function | None = None

    def start(self) -> None:
        """Begin a step."""
        # Its library would tell every start on the error stream; it reads this before its first use.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU]
        if self._mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()
        self._range = record_function(_STEP)
        self._range.__enter__()

    def stop(self) -> dict[str, float]:
        """End the step; return its seconds by part. Exposed communication is named as the planner does."""
        if self._profile is None or self._range is None:
            raise RuntimeError("no step was begun; call start before it")
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)
        done = self._profile
        self.close()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            done.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        return step_parts(events, self._mesh)

    def close(self) -> None:
        """Let a step that was begun go on unprofiled."""
        if self._profile is not None and self._range is not None:
            self._range.__exit__(None, None, None)
            self._profile.stop()
        self._profile = self._range = None


def step_parts(events: Iterable[Mapping[str, Any]], mesh: Mesh) -> dict[str, float]:
    """Return a profiled step's seconds by part; events: of a trace in Chrome's format, in microseconds."""
    spans = [event for event in events if event.get("ph") == "X"]
    (step,) = (event for event in spans if event["name"] == _STEP and event["cat"] == "user_annotation")
    threads: dict[Any, list[Mapping[str, Any]]] = {}
    for event in spans:
        # Ranges of the communication library last until it is done: they overlap with the thread's operators.
        if event["cat"] in (*_CPU, *_LAUNCH) and not event["name"].startswith(("gloo:", "nccl:")):
            threads.setdefault(event["tid"], []).append(event)
    found: dict[str, float] = {}
    if mesh.device.type == "cuda":
        launched: dict[int, str] = {}
        for own in threads.values():
            for segment in _segments(own, mesh):
                launched |= segment.launched
        parts = _on_device([event for event in spans if event["cat"] in _DEVICE], launched, step, mesh)
    else:
        parts = ((segment.part, segment.seconds) for segment in _segments(threads[step["tid"]], mesh))
    for part, seconds in parts:
        found[part] = found.get(part, 0.0) + seconds
    return {part: seconds for part, seconds in found.items() if seconds > 0}


class _Open(NamedTuple):
    """An operator or range that hasn't ended."""

    end: float
    part: str
    lasting: bool
    """Whether what happens within belongs to the same part."""
    gathers: bool
    """Whether it is FSDP's, in which time of its own is waiting for the newest collective."""


class _Segment(NamedTuple):
    """A stretch of a thread's time, spent in one operator itself."""

    part: str
    seconds: float
    launched: dict[int, str]
    """By correlation number: the part that a kernel belongs to, which was launched at its beginning."""


def _segments(events: list[Mapping[str, Any]], mesh: Mesh) -> Iterator[_Segment]:
    """Yield a thread's time within the step, operator by operator."""
    waiting = "bubble" if mesh.pipeline is not None else "launch"
    open_: list[_Open] = []
    at, newest = 0.0, "other"

    def upto(moment: float) -> Iterator[_Segment]:
        nonlocal at
        if open_ and moment > at:
            yield _Segment(open_[-1].part, (moment - at) * 1e-6, {})
        at = max(at, moment)

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while open_ and open_[-1].end <= event["ts"]:
            yield from upto(open_[-1].end)
            open_.pop()
        yield from upto(event["ts"])
        above = open_[-1] if open_ else None
        if event["cat"] in _LAUNCH:
            correlation = event.get("args", {}).get("correlation")
            if above and correlation is not None:
                yield _Segment(above.part, 0.0, {correlation: above.part})
            continue
        end = event["ts"] + event["dur"]
        if event["name"] == _STEP:
            entered = _Open(end, waiting, False, False)
        elif above is None and mesh.device.type != "cuda":
            continue  # before the step, or after it
        elif _is_collective(event["name"]) and _operation(event["name"]) == "other":  # waits for one, or wraps it
            entered = _Open(end, newest, True, False)
        else:
            entered = _enter(event["name"], above, mesh)
            newest = entered.part if " over " in entered.part else newest
            if above and above.gathers and entered.lasting and " over " in entered.part:
                open_[-1] = above._replace(part=entered.part)  # what it waits for from now on
        open_.append(entered._replace(end=min(end, above.end) if above else end))
    while open_:
        yield from upto(open_[-1].end)
        open_.pop()


def _enter(name: str, above: _Open | None, mesh: Mesh) -> _Open:
    """Return what begins with an operator or range of this name. Its end is the caller's business."""
    if _EXCHANGE.match(name):
        return _Open(0.0, name.replace(" over world", f" over {world_axis(mesh.layout)}"), True, False)
    if above and above.lasting and (" over " in above.part or not _is_collective(name)):
        return above._replace(gathers=False)
    if name.startswith("FSDP::"):
        operation = "reduce_scatter" if "post_backward" in name else "all_gather"
        return _Open(0.0, f"{operation} over shard", False, True)
    if _is_collective(name):
        return _Open(0.0, f"{_operation(name)} over {_axis(name, above, mesh)}", True, False)
    if name == OPTIMIZER:
        return _Open(0.0, "optimizer", True, False)
    if _MATMULS.search(name):
        return _Open(0.0, "matmul", True, False)
    if _ATTENTION.search(name):
        return _Open(0.0, "attention", True, False)
    return _Open(0.0, "other", False, False)


def _is_collective(name: str) -> bool:
    return name.startswith(("c10d::", "_c10d_functional::"))


def _axis(name: str, above: _Open | None, mesh: Mesh) -> str:
    """Return along which axis PyTorch's or our wrapper calls a collective."""
    operation = _operation(name)
    if above and above.gathers:
        return "replicas" if operation == "all_reduce" else "shard"
    if operation == "all_to_all":
        return "context"
    if operation == "send":
        return "context" if above and above.part == "attention" else "pipeline"
    return "tensor" if name.startswith("_c10d_functional::") else world_axis(mesh.layout)


def _operation(name: str) -> str:
    """Return the operation of a collective that an operator, the communication library or a kernel names."""
    plain = name.lower().replace("_", "").replace("::", "")
    for operation in ("reduce_scatter", "all_gather", "all_reduce", "all_to_all", "broadcast"):
        if operation.replace("_", "") in plain:
            return operation
    return "send" if "send" in plain or "recv" in plain else "other"


def _sent(kernel: Mapping[str, Any], launched: Mapping[int, str], axes: Mapping[str, str], mesh: Mesh) -> str:
    """Return the part of a communication kernel. Messages that were sent in one call don't say their group."""
    args = kernel.get("args", {})
    operation = _operation(str(args.get("Collective name", kernel["name"])))
    axis = axes.get(str(args.get("Process Group Name")))
    within = launched.get(args.get("correlation", -1), "")
    if axis is None and " over " in within:
        return within
    if axis is None and operation == "send" and mesh.pipeline is not None:
        axis = "pipeline"
    return f"{operation} over {axis or 'other'}"


def _on_device(
    kernels: list[Mapping[str, Any]], launched: Mapping[int, str], step: Mapping[str, Any], mesh: Mesh
) -> Iterator[tuple[str, float]]:
    """Yield parts and seconds of a device's time in the step: of each moment, what it computes, else what it sends."""
    axes = axis_names(mesh)
    edges: list[tuple[float, int, bool, str]] = []
    for kernel in kernels:
        args = kernel.get("args", {})
        sends = "nccl" in kernel["name"].lower()
        if sends:
            part = _sent(kernel, launched, axes, mesh)
        else:
            part = launched.get(args.get("correlation", -1), "other")
            part = "other" if " over " in part or part in ("launch", "bubble") else part
        edges.append((kernel["ts"], 1, sends, part))
        edges.append((kernel["ts"] + kernel["dur"], -1, sends, part))
    begin, end = step["ts"], step["ts"] + step["dur"]
    edges.append((end, 0, False, ""))
    running: dict[tuple[bool, str], int] = {}
    at = begin
    for moment, change, sends, part in sorted(edges):
        moment = min(max(moment, begin), end)
        if moment > at:
            # False sorts before True: what computes comes first.
            active = min((key for key, count in running.items() if count), default=(False, "launch"))
            yield active[1], (moment - at) * 1e-6
            at = moment
        running[sends, part] = running.get((sends, part), 0) + change
