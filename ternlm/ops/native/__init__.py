"""Functions in C for a CPU, built by this machine's own compiler when they are first wanted.

That takes a second; the result is kept in the user's cache folder. Where there is no compiler, on other systems than
Linux, or with TERNLM_NATIVE=0 in the environment, `is_available` is false and PyTorch's operators are for the caller to
use. Nothing here has a gradient.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

LANES = 16
"""Numbers of which a row's size has to be a multiple."""
BLOCK = 16
"""Tokens of a block of keys and values."""
_FOLDER = Path(__file__).parent
_SOURCES = ("attend.c", "rows.c")
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi", "-lm")
_KINDS: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
_PATIENCE = 120
"""Seconds that the compiler may take."""


class Pass(ctypes.Structure):
    """What `attend` is to do in one forward pass: the structure of this name in attend.c, where its fields are told."""

    _fields_ = (
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("q_stride", ctypes.c_int64),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("pieces", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("num_tasks", ctypes.c_int64),
        ("tasks", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the functions can be had for tensors like these; builds them if they aren't there yet."""
    return device.type == "cpu" and dtype in _KINDS and library(dtype) is not None


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the functions for tensors of this dtype; None where they can't be built."""
    if os.environ.get("TERNLM_NATIVE", "1") == "0" or sys.platform != "linux":  # where else OpenMP is PyTorch's own
        return None
    try:
        return _declared(_loaded(_built(dtype)) or ctypes.CDLL(str(_built(dtype))))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.warning("no C functions could be built, so texts are continued by slower ones: %s", str(reason).strip())
        return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, with sums in float32.

    more: x is added to it first, in place, and the sum is what the norm is of. The weight is float32; the others are
    contiguous, their rows multiples of LANES.
    """
    size = x.shape[-1]
    assert x.is_contiguous()
    assert more is None or (more.is_contiguous() and more.shape == x.shape and more.dtype == x.dtype)
    assert weight.dtype == torch.float32
    assert size == weight.numel()
    assert size % LANES == 0
    out = torch.empty_like(x)
    places = (x.data_ptr(), None if more is None else more.data_ptr(), weight.data_ptr(), out.data_ptr())
    _known(x.dtype).rms_norm(*places, x.numel() // size, size, eps, torch.get_num_threads())
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, (..., I): of one dtype, with rows that are multiples of LANES and evenly apart."""
    size = gate.shape[-1]
    gate_TI, up_TI = gate.view(-1, size), up.view(-1, size)
    assert gate_TI.shape == up_TI.shape
    assert gate_TI.stride() == up_TI.stride()
    assert gate_TI.stride(1) == 1
    assert gate.dtype == up.dtype
    assert size % LANES == 0
    out = torch.empty(gate.shape, dtype=gate.dtype)
    places = (gate.data_ptr(), up.data_ptr(), out.data_ptr())
    _known(gate.dtype).silu_mul(*places, len(gate_TI), size, gate_TI.stride(0), torch.get_num_threads())
    return out


def rotate_(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate heads by their tokens' positions in place, as `model.rope.rotate` returns them.

    Heads lie behind each other, tokens anyhow; H is a multiple of 2. cos and sin: of x's dtype, (B, T, 1, H).
    """
    batch, num, heads, size = x_BTNH.shape
    assert x_BTNH.dtype == cos.dtype == sin.dtype
    assert x_BTNH.stride()[2:] == (size, 1)
    assert batch == 1 or x_BTNH.stride(0) == num * x_BTNH.stride(1)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert cos.numel() == sin.numel() == batch * num * size
    places = (x_BTNH.data_ptr(), cos.data_ptr(), sin.data_ptr())
    _known(x_BTNH.dtype).rotate(*places, batch * num, heads, size, x_BTNH.stride(1), torch.get_num_threads())


def _known(dtype: torch.dtype) -> ctypes.CDLL:
    found = library(dtype)
    assert found is not None, "ask `is_available` first"
    return found


def _loaded(library: Path) -> ctypes.CDLL | None:
    """Return a library; None, and it's removed, if it isn't whole, as after a power failure."""
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        library.unlink()
        return None


def _declared(functions: ctypes.CDLL) -> ctypes.CDLL:
    place, number, single = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for name, arguments, result in (
        ("attend", [ctypes.POINTER(Pass), *[place] * 5], None),
        ("tokens_of_task", [number] * 2, number),
        ("keys_of_chunk", [], number),
        ("scratch_size", [number] * 5, number),
        ("rms_norm", [place] * 4 + [number] * 2 + [single, number], None),
        ("silu_mul", [place] * 3 + [number] * 4, None),
        ("rotate", [place] * 3 + [number] * 5, None),
    ):
        function = getattr(functions, name)
        function.argtypes, function.restype = arguments, result
    return functions


def _built(dtype: torch.dtype) -> Path:
    """Return the library's file, made now unless the same sources were built here before."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (cc, gcc or clang); install one to have them")
    command = [*compiler.split(), *(str(_FOLDER / name) for name in _SOURCES), *_FLAGS, *_KINDS[dtype]]
    texts = [(_FOLDER / name).read_text(encoding="utf-8") for name in (*_SOURCES, "vectors.h")]
    key = hashlib.sha256("\0".join([*command, _processor(), torch.__version__, *texts]).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ternlm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home to write to
        folder = Path(tempfile.mkdtemp(prefix="ternlm-"))
    library = folder / f"native-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=_PATIENCE)
            made.replace(library)
    return library


def _processor() -> str:
    """Return what tells apart processors that run different instructions: a home may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
