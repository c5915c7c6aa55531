"""How a rank finds the others: torchrun's or Slurm's environment, read once, before anything is allocated.

Does not start ranks: `torchrun` and `srun` do.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ternlm.config.section import ConfigError


@dataclass(frozen=True)
class Launch:
    """Which rank this process is."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Among the ranks of this node: the number of its device."""


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the rank from the environment of torchrun or `srun`; one rank where there is neither.

    Raises ConfigError where only a part of it is set.
    """
    if "WORLD_SIZE" in environment or "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return Launch(*_integers(environment, names, "start the ranks with torchrun"))
    # A shell inside an allocation has SLURM_JOB_ID; only a task that srun started has SLURM_STEP_ID and a rank of it.
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        return Launch(*_integers(environment, names, "start the ranks with srun"))
    return Launch()


@contextmanager
def process_group(launch: Launch, device: torch.device, timeout_minutes: float) -> Iterator[None]:
    """Join the ranks for the time of the block; does nothing on one rank.

    A rank that hears nothing from another for `timeout_minutes` raises, and the launcher ends the job.
    """
    if launch.world == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            "MASTER_ADDR isn't set, the address of the first node; under Slurm set it in the job's script: "
            "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500"
        )
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=launch.rank,
        world_size=launch.world,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    except BaseException:
        # Others may hang in a collective that this rank won't join: no waiting for them, the launcher ends them.
        raise
    else:
        dist.barrier()
        dist.destroy_process_group()


def log_from(launch: Launch) -> None:
    """Let rank 0 log everything, the others only warnings, each with its rank."""
    if launch.world == 1:
        return
    root = logging.getLogger()
    if launch.rank:
        root.setLevel(logging.WARNING)
    for handler in root.handlers:
        handler.setFormatter(logging.Formatter(f"[rank {launch.rank}] %(message)s" if launch.rank else "%(message)s"))


def _integers(environment: Mapping[str, str], names: tuple[str, ...], remedy: str) -> list[int]:
    values = []
    for name in names:
        try:
            values.append(int(environment[name]))
        except (KeyError, ValueError):
            raise ConfigError(
                f"the environment's {name} = {environment.get(name)!r} must be a number, since another of "
                f"{', '.join(names)} is set; {remedy}, or unset all of them"
            ) from None
    return values
