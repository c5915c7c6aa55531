"""Where a step's time goes: a torch profile sorted into kinds of work.

On CUDA the times are those of kernels on the device, and what is left of the step is time in which it stood idle. On
a CPU they are each operator's own time.
"""

import re

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first that fits a kernel's or an operator's name counts.
KINDS: tuple[tuple[str, str], ...] = (
    ("attention", r"flash|fmha|attention|attn"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|splitk|::mm|addmm|bmm|matmul|linear"),
    ("optimizer and clipping", r"adam|multi_tensor|foreach|lpnorm|vector_norm"),
    ("compiled blocks, without matrix products", r"triton_|graph_\d+_cpp|cpp_fused|CompiledFx|CompiledFunction"),
    ("copies and fills", r"memcpy|memset|copy|fill|zero_|::cat|direct_copy"),
    (
        "uncompiled elementwise and reductions (loss, casts, norms)",
        r"elementwise|reduce|softmax|scatter|gather|index|logsumexp|embedding|::(mul|add|sub|exp|sum|argmax|div|mean|rsqrt)",
    ),
)
OTHER = "other"
NUM_LISTED = 25


def make_profiler(device: torch.device) -> profile:
    """Return a profiler of the host and, where there is one, the CUDA device."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


def describe_profile(profiler: profile, device: torch.device, steps: int, step_seconds: float) -> dict:
    """Return milliseconds a step by kind of work, by named region, and of the longest kernels.

    step_seconds: duration of a profiled step (longer than an undisturbed one).
    """
    on_device = device.type == "cuda"
    kinds: dict[str, float] = {}
    regions: dict[str, float] = {}
    entries: list[tuple[str, float, float]] = []
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CUDA) != on_device:
            continue
        if event.is_user_annotation:
            total = event.device_time_total if on_device else event.cpu_time_total
            regions[event.key] = total / 1e3 / steps
            continue
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + own / 1e3 / steps
        entries.append((event.key, own / 1e3 / steps, event.count / steps))
    entries.sort(key=lambda entry: -entry[1])
    return {
        "step_ms": step_seconds * 1e3,
        "kinds_ms": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "idle_ms": max(0.0, step_seconds * 1e3 - sum(kinds.values())) if on_device else None,
        "regions_ms": regions,
        "longest": [{"name": name, "ms": ms, "calls": calls} for name, ms, calls in entries[:NUM_LISTED]],
    }


def kind_of(name: str) -> str:
    """Return the kind of work that a kernel or operator does, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)
