"""The process group of a run's ranks, for the time of a block, and the watch that ends all where one has failed.

A collective that waits for too long raises by itself; a rank that is killed closes its connections, at which those
who hear from it raise. The watch ends the ranks that neither reaches, such as one that hangs in reading data, and
says where they hung. A stopped process (SIGSTOP) is left to the launcher, which kills it.
"""

import faulthandler
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

import torch
import torch.distributed as dist

from ternlm.config.section import ConfigError, UserError
from ternlm.parallel.launch import FailedElsewhere, Launch

GRACE_SECONDS = 10.0
"""How long a rank may go on after another has failed; longer than an error of the user's waits to be printed."""

_POLL_SECONDS = 1.0
_FAILURE = "failure"


@contextmanager
def process_group(launch: Launch, device: torch.device, timeout_minutes: float) -> Iterator[None]:
    """Join the ranks for the time of the block; does nothing on one rank.

    A rank that hears nothing from another for `timeout_minutes` raises. Where one raises, the others follow: most
    with FailedElsewhere, the rest after GRACE_SECONDS, ended with their stacks printed.
    """
    if launch.world == 1:
        yield
        return
    store = _join(launch, device, timedelta(minutes=timeout_minutes))
    ended = Event()
    own = store.clone()  # type: ignore[attr-defined]  # a store's calls wait for each other, this one's mustn't
    watch = Thread(target=_watch, args=(own, launch.rank, ended), name="ternlm-watch", daemon=True)
    watch.start()
    try:
        with warnings.catch_warnings():
            # PyTorch 2.13 renames collectives, which its own FSDP and we call; 2.11 lacks the new names.
            warnings.filterwarnings("ignore", r"`torch\.distributed\.[\w.]+` is deprecated", FutureWarning)
            yield
        dist.barrier()
    except BaseException as error:
        first = _report(store, launch.rank, error)
        if launch.rank == 0:
            time.sleep(2 * _POLL_SECONDS)  # where it holds the store, for the others to read there what has failed
        if first is not None and not isinstance(error, UserError):
            raise FailedElsewhere(f"ends, since another failed first: {first} (here: {_one_line(error)})") from error
        raise  # and no waiting for the others, which may hang in a collective that this rank won't join
    finally:
        ended.set()
    watch.join()
    dist.destroy_process_group()


def _join(launch: Launch, device: torch.device, timeout: timedelta) -> dist.Store:
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            "MASTER_ADDR isn't set, the address of the first node; under Slurm set it in the job's script: "
            "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500"
        )
    os.environ.setdefault("MASTER_PORT", "29500")
    # A collective of NCCL that times out or fails ends the process, instead of leaving it with wrong numbers.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    try:
        shared, _, _ = next(dist.rendezvous("env://", launch.rank, launch.world, timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"MASTER_PORT = {os.environ['MASTER_PORT']} is in use on this node, by another job perhaps; rank 0 needs "
            "it for itself; export another, such as MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))"
        ) from error
    store = _part_of_this_start(shared, launch, timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return store


def _part_of_this_start(store: dist.Store, launch: Launch, timeout: timedelta) -> dist.Store:
    """Return a part of the store that only the ranks of this start use. Collective.

    torchrun keeps the store over restarts, with addresses of ranks that are gone, which gloo would call; and its nodes
    may count restarts differently. So rank 0 draws a name, and answers each rank's newest greeting with it.
    """
    own = secrets.token_hex(8)
    if launch.rank:
        store.set(f"ternlm/greeting/{launch.rank}", own)
        start = store.get(f"ternlm/answer/{own}").decode()
        store.add(f"ternlm/here/{start}", 1)
        return dist.PrefixStore(f"ternlm/{start}", store)
    deadline = time.monotonic() + timeout.total_seconds()
    while (here := 1 + store.add(f"ternlm/here/{own}", 0)) < launch.world:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {here} of {launch.world} ranks have started within {timeout}")
        for rank in range(1, launch.world):
            greeting = f"ternlm/greeting/{rank}"
            if store.check([greeting]):
                store.set(f"ternlm/answer/{store.get(greeting).decode()}", own)
        time.sleep(0.05)
    return dist.PrefixStore(f"ternlm/{own}", store)


def _report(store: dist.Store, rank: int, error: BaseException) -> str | None:
    """Tell the others of this rank's failure; returns the first failure's description where it was another's."""
    own = f"rank {rank}: {_one_line(error)}"
    try:
        first = store.compare_set(_FAILURE, "", own).decode(errors="replace")
    except RuntimeError:  # whoever held the store is gone: rank 0, or torchrun
        return None
    return first if first != own else None


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _watch(store: dist.Store, rank: int, ended: Event) -> None:
    """End this process where a rank has failed and this one doesn't notice."""
    reason = "the launcher or rank 0 was gone"
    while not ended.wait(_POLL_SECONDS):
        try:
            if store.check([_FAILURE]):
                reason = f"another failed, {store.get(_FAILURE).decode(errors='replace')}"
                break
        except RuntimeError:
            break
    else:
        return
    if ended.wait(GRACE_SECONDS):
        return
    sys.stderr.write(
        f"[rank {rank}] hung {GRACE_SECONDS:g} s after {reason}; it ends here, where its threads were at:\n"
    )
    sys.stderr.flush()
    faulthandler.dump_traceback(all_threads=True)
    os._exit(1)
