"""Real `tern` processes as the ranks of a run, forked instead of started: 0.1 s where torchrun takes 8.

Nothing ends the others when one ends, as torchrun would: `Ranks` is what they do by themselves.
"""

import importlib.util
import multiprocessing
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from ranks import PRELOAD, free_port

from ternlm.data.prepare import prepare
from ternlm.data.train_tokenizer import train_tokenizer

RECIPE = """
out = "{out}"
[model]
vocab_size = 512
hidden_size = 48
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 104
attention_bias = true
max_position_embeddings = 64
init.kind = "plain"
[data]
seq_len = 64
sources = [{{ name = "code", path = "{data}" }}]
[batch]
global_sequences = 8
microbatch_sequences = 1
[train]
steps = {steps}
[compute]
device = "cpu"
compile = "off"
threads = 1
peak_tflops = 0.1
[checkpoint]
every_steps = 2
keep_last = 3
[monitor]
progress = "lines"
"""


def write_data(folder: Path) -> Path:
    """Tokenize a file of the standard library; return the folder of shards."""
    text = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    train_tokenizer([text], 512, folder / "tokenizer", format="text")
    prepare([text], folder / "tokenizer", folder / "tokens", format="text", text_document="paragraph", workers=1)
    return folder / "tokens"


def write_recipe(out: Path, data: Path, steps: int) -> Path:
    """Write the recipe of a small run into a file beside `out`."""
    path = out.with_suffix(".toml")
    path.write_text(RECIPE.format(out=out, data=data, steps=steps))
    return path


class Ranks:
    """The processes of one start of a run."""

    def __init__(
        self,
        logs: Path,
        world: int,
        words: list[str],
        *,
        slurm: bool = False,
        before: Callable[[int], None] | None = None,
    ) -> None:
        """words: after `tern`. before: a file's top-level function, called in each process with its rank."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "ternlm.cli"])
        logs.mkdir(parents=True, exist_ok=True)
        self._logs, port = [logs / f"rank{rank}.log" for rank in range(world)], free_port()
        self.processes = []
        for rank, log in enumerate(self._logs):
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
            names = names if slurm else ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            environment = dict(zip(names, map(str, (rank, world, rank)), strict=True))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if slurm:
                environment |= {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}
            place = (before.__code__.co_filename, before.__name__) if before else None
            self.processes.append(
                context.Process(target=_run, args=(rank, environment, words, str(log), sys.path, place))
            )
        for process in self.processes:
            process.start()
        self.started = time.monotonic()

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a rank."""
        os.kill(self.processes[rank].pid, number)

    def running(self) -> bool:
        """Whether none has ended."""
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = 60.0) -> list[int | None]:
        """Return the exit codes once all have ended; those that last longer than `seconds` are killed: None."""
        deadline, codes = time.monotonic() + seconds, []
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        for process in self.processes:
            codes.append(None if process.is_alive() else process.exitcode)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        return codes

    def log(self, rank: int) -> str:
        """Return what a rank has printed."""
        return self._logs[rank].read_text() if self._logs[rank].exists() else ""


def _run(
    rank: int, environment: dict[str, str], words: list[str], log: str, path: list[str], place: tuple[str, str] | None
) -> None:
    import torch

    from ternlm.cli import main

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    sys.path[:], sys.argv = path, ["tern", *words]
    if place is not None:
        spec = importlib.util.spec_from_file_location("before_ranks", place[0])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        getattr(module, place[1])(rank)
    main()
