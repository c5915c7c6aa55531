"""Gloo ranks for tests, forked from a server that has imported torch: 0.1 s a group, where torchrun takes 5 to 20.

The server (multiprocessing's forkserver, started once per test run) never computes: a fork after OpenMP threads have
started would hang. `conftest.py` puts this folder on the path: `from ranks import run_ranks`.
"""

import importlib.util
import inspect
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "numpy",
    "pydantic",
    "tokenizers",
    "ternlm.train.pretrain",
]


class RankFailure(AssertionError):
    """A rank raised; the message holds its traceback."""


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Return what `function(*args)` returned on each of `world` ranks of a gloo group, in a fresh process each.

    function: of a file's top level; its file is imported anew in the ranks. timeout: seconds, of each collective too.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="ternlm-ranks-") as name:
        folder = Path(name)
        job = (
            inspect.getfile(function),
            function.__name__,
            pickle.dumps(args),
        )  # bytes: tensors would go as open files
        port = free_port()
        children = [
            context.Process(target=_run_rank, args=(rank, world, port, folder, timeout, sys.path, job))
            for rank in range(world)
        ]
        for child in children:
            child.start()
        deadline = time.monotonic() + timeout
        for child in children:
            child.join(max(deadline - time.monotonic(), 0.0))
            if child.is_alive():
                child.kill()
                child.join()
        outcomes = [_read(folder / str(rank)) for rank in range(world)]
    failures = [(when, f"rank {rank}: {value}") for rank, (when, good, value) in enumerate(outcomes) if not good]
    if failures:
        raise RankFailure(min(failures)[1])  # the first to fail; the others mostly miss it
    return [value for _, _, value in outcomes]


def free_port() -> int:
    """Return a TCP port that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _read(path: Path) -> tuple[float, bool, Any]:
    if not path.exists():
        return float("inf"), False, "was killed, by the timeout or by itself"
    return (path.stat().st_mtime, *pickle.loads(path.read_bytes()))


def _run_rank(
    rank: int, world: int, port: int, folder: Path, timeout: float, path: list[str], job: tuple[str, str, bytes]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    sys.path[:] = path
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    file, name, args = job
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        spec = importlib.util.spec_from_file_location(f"ranks_of_{Path(file).stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        outcome: tuple[bool, Any] = (True, getattr(module, name)(*pickle.loads(args)))
        data = pickle.dumps(outcome)
        dist.barrier()
    except BaseException:
        data = pickle.dumps((False, traceback.format_exc()))
    part = folder / f"{rank}.part"
    part.write_bytes(data)
    part.rename(folder / str(rank))
    os._exit(0)  # no waiting for process groups whose other side may be gone
