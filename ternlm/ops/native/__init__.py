"""Functions in C for a CPU, built by this machine's own compiler when they are first wanted.

That takes a second; the result is kept in the user's cache folder. Where there is no compiler, on other systems than
Linux, or with TERNLM_NATIVE=0 in the environment, `is_available` is false and PyTorch's operators are for the caller to
use. Nothing here has a gradient. Built by gcc the functions run on the threads that PyTorch has of libgomp; another
compiler's OpenMP library (CC=clang) has threads of its own, which wait for each other's cores.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
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
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fwrapv", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi", "-lm")
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
    if os.environ.get("TERNLM_NATIVE", "1") == "0" or sys.platform != "linux":
        return None
    kept = _cache_folder()
    try:
        command = _command(dtype)
        if kept is not None:
            try:
                return _load(command, kept)
            except (OSError, subprocess.CalledProcessError) as error:  # full, or nothing may be run from there
                _log.info("C functions can't be had from %s: %s", kept, _told(error))
        with tempfile.TemporaryDirectory(prefix="ternlm-") as folder:
            return _load(command, Path(folder))  # what is loaded stays
    except Exception as error:  # whatever is wrong with a compiler, there is another way
        _log.warning("no C functions could be built, so texts are continued by slower ones: %s", _told(error))
        return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, with sums in float32.

    more: x is added to it first, in place, and the sum is what the norm is of. The weight is float32; the others are
    contiguous, their rows multiples of LANES. Raises ValueError where that isn't so.
    """
    size = x.shape[-1]
    alike = more is None or (more.is_contiguous() and more.shape == x.shape and more.dtype == x.dtype)
    good_weight = weight.dtype == torch.float32 and weight.is_contiguous() and weight.shape == (size,)
    given = (x, weight) if more is None else (x, weight, more)
    _require(x.is_contiguous() and alike and good_weight and size % LANES == 0, "rms_norm", *given)
    out = torch.empty_like(x)
    places = (x.data_ptr(), None if more is None else more.data_ptr(), weight.data_ptr(), out.data_ptr())
    loaded(x.dtype).rms_norm(*places, x.numel() // size, size, eps, torch.get_num_threads())
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, (..., I): of one dtype, with rows that are multiples of LANES and evenly apart. Raises
    ValueError where they aren't."""
    size, apart = gate.shape[-1], _row_stride(gate)
    alike = gate.shape == up.shape and apart == _row_stride(up) and gate.dtype == up.dtype
    _require(alike and apart is not None and size % LANES == 0, "silu_mul", gate, up)
    out = gate.new_empty(gate.shape)
    places = (gate.data_ptr(), up.data_ptr(), out.data_ptr())
    loaded(gate.dtype).silu_mul(*places, gate.numel() // size, size, apart, torch.get_num_threads())
    return out


def rotate_(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate heads by their tokens' positions in place, as `model.rope.rotate` returns them.

    Heads lie behind each other, tokens evenly apart; H is a multiple of 2. cos and sin: of x's dtype, (B, T, 1, H).
    Raises ValueError where that isn't so.
    """
    batch, num, heads, size = x_BTNH.shape
    even = x_BTNH.stride()[2:] == (size, 1) and (batch == 1 or x_BTNH.stride(0) == num * x_BTNH.stride(1))
    tables = cos.shape == sin.shape == (batch, num, 1, size) and cos.is_contiguous() and sin.is_contiguous()
    _require(even and tables and x_BTNH.dtype == cos.dtype == sin.dtype and size % 2 == 0, "rotate_", x_BTNH, cos, sin)
    places = (x_BTNH.data_ptr(), cos.data_ptr(), sin.data_ptr())
    loaded(x_BTNH.dtype).rotate(*places, batch * num, heads, size, x_BTNH.stride(1), torch.get_num_threads())


def loaded(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the functions for tensors of this dtype. Raises RuntimeError where there are none."""
    found = library(dtype)
    if found is None:
        raise RuntimeError(f"there are no C functions for {dtype}; ask `is_available` first")
    return found


def _row_stride(x: Tensor) -> int | None:
    """Return how far rows lie apart; None where they aren't evenly apart, each in one piece."""
    try:
        stride, step = x.view(-1, x.shape[-1]).stride()
    except RuntimeError:  # no view has these rows, or they are empty
        return None
    return stride if step == 1 else None


def _require(suits: bool, name: str, *tensors: Tensor) -> None:
    """Raise ValueError unless tensors are as a function reads them: in C nothing else would notice."""
    if not suits or any(x.device.type != "cpu" for x in tensors):
        told = "; ".join(f"{tuple(x.shape)} by {x.stride()}, {x.dtype}, {x.device}" for x in tensors)
        raise ValueError(f"{name} can't read tensors like these: {told}")


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


def _cache_folder() -> Path | None:
    """Return the folder that libraries are kept in; None where there is none that is the user's alone to write to."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ternlm" / "native"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError) as error:  # no home, or one that can't be written to
        _log.info("C functions are built anew at every start, there is no folder to keep them in: %s", error)
        return None
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        _log.info("C functions are built anew at every start, others may write to %s: chmod go-w it", folder)
        return None
    return folder


def _load(command: list[str], folder: Path) -> ctypes.CDLL:
    """Return the library that is kept in a folder, built now if it isn't there yet, or not as it was."""
    key = _key(command)
    found = next((path for path in sorted(folder.glob(f"native-{key}-*.so")) if _is_whole(path)), None)
    return _declared(ctypes.CDLL(str(found or _build(command, folder, key))))


def _is_whole(path: Path) -> bool:
    """Whether a library holds what its name says; another is taken away, since to load it could end the process."""
    if path.stem.endswith(_digest(path.read_bytes())):
        return True
    _log.info("%s is damaged and is built anew", path)
    path.unlink(missing_ok=True)
    return False


def _told(error: Exception) -> str:
    """Return what went wrong, of a compiler's own words the last ones."""
    if isinstance(error, subprocess.CalledProcessError):
        return " | ".join([shlex.join(error.cmd[:1]), *str(error.stderr).strip().splitlines()[-4:]])
    return str(error) or type(error).__name__


def _command(dtype: torch.dtype) -> list[str]:
    """Return what builds a library, but for where to."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "cc")), None)
    if compiler is None:
        raise FileNotFoundError("there is no C compiler; install gcc to have them")
    return [*shlex.split(compiler), *(str(_FOLDER / name) for name in _SOURCES), *_FLAGS, *_KINDS[dtype]]


def _key(command: list[str]) -> str:
    """Return what tells libraries apart: their sources, command, PyTorch and processor."""
    texts = [(_FOLDER / name).read_text(encoding="utf-8") for name in (*_SOURCES, "vectors.h")]
    return _digest("\0".join([*command, _processor(), torch.__version__, *texts]).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _build(command: list[str], folder: Path, key: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "made.so"
        words = [*command, "-o", str(made)]
        subprocess.run(words, check=True, capture_output=True, text=True, errors="replace", timeout=_PATIENCE)
        with made.open("rb") as file:
            content = file.read()
            os.fsync(file.fileno())  # whole before it has its name, whatever happens to the machine
        return made.replace(folder / f"native-{key}-{_digest(content)}.so")


def _processor() -> str:
    """Return what tells apart processors that run different instructions: a home may be shared by several machines."""
    names = ("model name", "flags", "Features", "CPU implementer", "CPU variant", "CPU part", "cpu\t", "isa", "uarch")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return platform.machine() + "\n".join(sorted({line for line in lines if line.startswith(names)}))
