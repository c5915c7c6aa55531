"""How a rank finds the others and how it ends: torchrun's or Slurm's environment, what is logged, the exit code.

Loads no torch, so that a mistake in the settings shows at once. Does not start ranks: `torchrun` and `srun` do.
"""

import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from ternlm.config.section import ConfigError

ALIKE_SECONDS = 5.0
"""How long other ranks wait with an error of the user's for rank 0, which mostly finds and prints the same."""


class FailedElsewhere(RuntimeError):
    """This rank ends because another failed, whose traceback says why."""


@dataclass(frozen=True)
class Launch:
    """Which rank this process is."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """The number of its device, among those that it sees."""
    restarted: bool = False
    """Whether torchrun or Slurm has started the same command anew."""
    node_ranks: int = 0
    """How many ranks are on a node; 0: the launcher doesn't say."""

    @property
    def node_size(self) -> int:
        """How many ranks are on a node, all of them where the launcher doesn't say."""
        return self.node_ranks or self.world


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the rank from the environment of torchrun or `srun`; one rank where there is neither.

    Raises ConfigError where only a part of it is set.
    """
    if "WORLD_SIZE" in environment or "RANK" in environment:
        names: tuple[str, ...] = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        names += ("LOCAL_WORLD_SIZE",) if "LOCAL_WORLD_SIZE" in environment else ()
        again = environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or _requeued(environment)
        rank, world, local, *here = _integers(environment, names, "start the ranks with torchrun")
        return Launch(rank, world, local, again, *here)
    # A shell inside an allocation has SLURM_JOB_ID; only a task that srun started has SLURM_STEP_ID and a rank of it.
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        rank, world, local_rank = _integers(environment, names, "start the ranks with srun")
        # `srun --gpus-per-task=1` shows each rank its own device alone, as number 0.
        alone = len(environment.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
        here = re.findall(r"^\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 8(x4)
        return Launch(rank, world, 0 if alone else local_rank, _requeued(environment), *map(int, here))
    return Launch(restarted=_requeued(environment))


def _requeued(environment: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in environment and environment.get("SLURM_RESTART_COUNT", "0") != "0"


def log_from(launch: Launch) -> None:
    """Let rank 0 log everything, the others only warnings, each with its rank, and of training itself errors."""
    if launch.world == 1:
        return
    root = logging.getLogger()
    if launch.rank:
        root.setLevel(logging.WARNING)
        logging.getLogger("ternlm.train").setLevel(logging.ERROR)  # its warnings are the same on all ranks
    for handler in root.handlers:
        handler.setFormatter(logging.Formatter(f"[rank {launch.rank}] %(message)s" if launch.rank else "%(message)s"))


def end_rank(launch: Launch, error: BaseException, message: str | None) -> NoReturn:
    """Print what went wrong on this rank of several and end it, with exit code 2 where the user can put it right.

    message: what to print instead of a traceback. Ends at once: the interpreter's own end would wait for threads and
    process groups whose other side may be gone.
    """
    if message is not None and launch.rank:
        # The launcher ends this rank as soon as rank 0 has said the same, so that it is said once.
        time.sleep(ALIKE_SECONDS)
    if message is not None:
        text = f"error: {message}"
    elif isinstance(error, FailedElsewhere):
        text = str(error)
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
    prefix = f"[rank {launch.rank}] " if launch.rank or message is None else ""
    sys.stdout.flush()
    # One write, so that the lines of several ranks don't mix.
    sys.stderr.write("".join(f"{prefix}{line}\n" for line in text.splitlines()))
    sys.stderr.flush()
    os._exit(1 if message is None else 2)


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
