"""kill -9 one of four ranks: started again, the run ends as if nothing had happened, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from started import Ranks, write_data, write_recipe

from ternlm.checkpoint.folders import MARKER, checkpoint_folder, complete_steps

WORLD = 4
STEPS = 16
# Gradients cut over pairs of ranks, optimizer states over all: every kind of traffic, and pieces of every kind.
SETTINGS = ("sharding.params=2", "sharding.grads=2", "sharding.optimizer=-1", "parallel.timeout_minutes=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("code"))


def start(folder, name, data, steps):
    recipe = write_recipe(folder / name, data, steps)
    return Ranks(folder / f"{name}-logs", WORLD, ["train", str(recipe), *SETTINGS])


def finish(ranks):
    assert ranks.wait(600) == [0] * WORLD, "\n".join(ranks.log(rank) for rank in range(WORLD))


def newest(run):
    return max(complete_steps(run), default=0)


def saving(run):
    """Tell whether a checkpoint is half written."""
    folders = (run / "checkpoints").glob("step-*")
    return any(not (folder / MARKER).exists() and int(folder.name[5:]) > newest(run) for folder in folders)


def tensors(run, steps):
    """SHA-256 of the files that hold weights and optimizer states after the last step."""
    lines = (checkpoint_folder(run, steps) / MARKER).read_text().splitlines()
    found = dict(reversed(line.split("  ", 1)) for line in lines)
    return {name: digest for name, digest in found.items() if name.endswith(".distcp")}


def records(run):
    """The metrics that don't depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("speed/", "time/", "data/wait", "memory/")
    return [{name: value for name, value in line.items() if not name.startswith(clock)} for line in lines]


def assert_equal_runs(killed, whole, steps):
    assert len(tensors(whole, steps)) == WORLD
    assert tensors(killed, steps) == tensors(whole, steps)
    assert records(killed) == records(whole)
    assert [line["step"] for line in records(whole)] == list(range(1, steps + 1))
    assert not saving(killed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, "whole", data, STEPS))
    return folder / "whole"


@pytest.mark.parametrize("amid_save", [False, True], ids=["between_saves", "amid_a_save"])
def test_a_run_whose_rank_was_killed_ends_with_the_same_bits(tmp_path, data, whole, amid_save):
    ranks = start(tmp_path, "killed", data, STEPS)
    run, rng = tmp_path / "killed", random.Random(amid_save)
    while newest(run) < 4 or saving(run) != amid_save:
        assert ranks.running(), ranks.log(0)
        time.sleep(0.001)
    ranks.send(0 if amid_save else rng.randrange(1, WORLD), signal.SIGKILL)
    codes = ranks.wait(60)
    assert None not in codes, "a rank went on without the killed one"
    assert 0 not in codes, "the run ended before it was killed; give it more steps"
    again = start(tmp_path, "killed", data, STEPS)
    finish(again)
    assert "resumed from" in again.log(0)
    assert "".join(again.log(rank) for rank in range(1, WORLD)) == ""
    assert_equal_runs(run, whole, STEPS)


@pytest.mark.slow
def test_torchrun_restarts_a_run_killed_ten_times_at_random_moments_with_the_same_bits(tmp_path, data):
    steps, kills = 100, 10
    finish(start(tmp_path, "whole", data, steps))
    run, rng, reached = tmp_path / "killed", random.Random(0), []
    recipe = write_recipe(run, data, steps)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = ["-m", "torch.distributed.run", f"--nproc-per-node={WORLD}", f"--max-restarts={kills}"]
    with open(tmp_path / "torchrun.log", "wb") as log:
        torchrun = subprocess.Popen(
            [sys.executable, *command, "-m", "ternlm", "train", str(recipe), *SETTINGS],
            stdout=log, stderr=log, env=environment, cwd=tmp_path,
        )  # fmt: skip
    try:
        for kill in range(kills):
            before, pids = newest(run), {}
            while newest(run) <= before:
                assert torchrun.poll() is None, (tmp_path / "torchrun.log").read_text()
                time.sleep(0.005)
            if kill % 2:
                while not saving(run) and torchrun.poll() is None:
                    time.sleep(0.0005)
            else:
                time.sleep(rng.random() * 0.15)
            pids = children(torchrun.pid)
            assert sorted(pids) == list(range(WORLD)), "the run ended before it was killed; give it more steps"
            victim = 0 if kill in (2, 3) else rng.randrange(WORLD)
            os.kill(pids[victim], signal.SIGKILL)
            while any(Path(f"/proc/{pid}").exists() for pid in pids.values()):  # torchrun ends all, then starts anew
                time.sleep(0.05)
            reached.append(newest(run))
        assert torchrun.wait(600) == 0, (tmp_path / "torchrun.log").read_text()[-5000:]
    finally:
        torchrun.kill()
    assert reached == sorted(reached)
    assert reached[-1] < steps
    assert (tmp_path / "torchrun.log").read_text().count("resumed from") == kills
    assert_equal_runs(run, tmp_path / "whole", steps)


def children(parent):
    """Return the process of each rank that `parent` has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                words = (folder / "environ").read_text().split("\0")
                found[int(next(word[5:] for word in words if word.startswith("RANK=")))] = int(folder.name)
        except (OSError, StopIteration):
            continue  # gone meanwhile, or not a rank
    return found
