"""How ranks start, what each prints, and that none waits for ever for one that raised, died or hangs."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from started import Ranks, write_data, write_recipe

from ternlm.checkpoint.folders import complete_steps
from ternlm.config.section import ConfigError
from ternlm.parallel.group import process_group
from ternlm.parallel.launch import ALIKE_SECONDS, Launch, find_launch

STEPS = 6
TIMEOUT = 3.0  # seconds


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("code"))


@pytest.fixture
def train(tmp_path, data):
    """Start `tern train` on some ranks: `(name, world, *settings, **options of Ranks) -> Ranks`."""
    started = []

    def start(name, world, *settings, steps=STEPS, **options):
        recipe = write_recipe(tmp_path / name, data, steps)
        words = ["train", str(recipe), f"parallel.timeout_minutes={TIMEOUT / 60}", *settings]
        started.append(Ranks(tmp_path / f"{name}-logs", world, words, **options))
        return started[-1]

    yield start
    for ranks in started:
        ranks.wait(0.0)


def wait_for_checkpoint(run, ranks):
    while not complete_steps(run):
        assert ranks.running(), [ranks.log(rank) for rank in range(len(ranks.processes))]
        time.sleep(0.02)


def test_without_a_launcher_there_is_one_rank():
    assert find_launch({}) == Launch(0, 1, 0)
    assert find_launch({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}) == Launch(0, 1, 0)  # a shell of an allocation
    assert find_launch({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == Launch(0, 1, 0)


def test_torchrun_and_slurm_are_read():
    assert find_launch({"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}) == Launch(5, 16, 1)
    slurm = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    assert find_launch(slurm) == Launch(9, 16, 1)
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"}
    assert find_launch({**slurm, **torchrun}) == Launch(5, 8, 5)
    assert find_launch({**torchrun, "TORCHELASTIC_RESTART_COUNT": "0"}) == Launch(5, 8, 5)
    assert find_launch({**torchrun, "TORCHELASTIC_RESTART_COUNT": "2"}) == Launch(5, 8, 5, restarted=True)
    assert find_launch({**slurm, "SLURM_RESTART_COUNT": "1"}) == Launch(9, 16, 1, restarted=True)


def test_the_ranks_of_a_node_are_read_where_the_launcher_says_them():
    torchrun = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
    assert find_launch({**torchrun, "LOCAL_WORLD_SIZE": "4"}).node_size == 4
    assert find_launch(torchrun).node_size == 16
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE = 'many' must be a number"):
        find_launch({**torchrun, "LOCAL_WORLD_SIZE": "many"})
    slurm = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    assert find_launch({**slurm, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}).node_size == 8
    assert find_launch(slurm).node_size == 16


def test_a_rank_of_slurm_that_sees_one_device_alone_takes_it():
    slurm = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
    assert find_launch({**slurm, "CUDA_VISIBLE_DEVICES": "3"}) == Launch(11, 16, 0)  # --gpus-per-task=1
    assert find_launch({**slurm, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == Launch(11, 16, 3)


def test_a_part_of_an_environment_is_refused():
    with pytest.raises(ConfigError, match=r"RANK = None must be a number.*start the ranks with torchrun"):
        find_launch({"WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match=r"SLURM_PROCID = 'x'.*start the ranks with srun"):
        find_launch({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "x"})


def test_only_rank_0_prints_and_both_launchers_train_the_same(tmp_path, train):
    runs = {name: train(name, 2, slurm=name == "slurm") for name in ("torchrun", "slurm")}
    losses = {}
    for name, ranks in runs.items():
        assert ranks.wait() == [0, 0], ranks.log(0) + ranks.log(1)
        assert f"step={STEPS}/{STEPS}" in ranks.log(0)
        assert f"stopped after step {STEPS}" in ranks.log(0)
        assert ranks.log(1) == ""
        assert "Warning" not in ranks.log(0)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        losses[name] = [line["loss/total"] for line in lines]
    assert losses["torchrun"] == losses["slurm"]


def test_what_pytorch_means_to_rename_floods_no_log(train):
    ranks = train("tensor", 2, "parallel.tensor=2", steps=1)
    assert ranks.wait() == [0, 0], ranks.log(0) + ranks.log(1)
    assert "Warning" not in ranks.log(0) + ranks.log(1)


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with (
            pytest.raises(ConfigError, match=rf"MASTER_PORT = {port} is in use on this node"),
            process_group(Launch(0, 2), torch.device("cpu"), 0.05),
        ):
            pytest.fail("joined")


def test_an_error_that_all_find_is_printed_once_by_rank_0(train):
    ranks = train("run", 2, "batch.global_sequences=7")
    ranks.processes[0].join(60)
    assert ranks.processes[0].exitcode == 2
    assert ranks.log(0).startswith("error: batch.global_sequences = 7 must be a multiple of")
    assert ranks.processes[1].is_alive()  # a launcher ends it now
    ranks.send(1, signal.SIGTERM)
    ranks.wait()
    assert ranks.log(1) == ""


def test_an_error_of_one_rank_alone_is_printed_by_it(tmp_path, train):
    ranks = train("run", 2, before=lose_the_data)
    codes = ranks.wait(ALIKE_SECONDS + 30)
    assert codes[1] == 2
    assert ranks.log(1).startswith("[rank 1] error: ")
    assert "nowhere" in ranks.log(1)
    assert codes[0] == 1
    assert "[rank 0] ends, since another failed first: rank 1: " in ranks.log(0)


def lose_the_data(rank):
    from ternlm.data.errors import DataError
    from ternlm.train import run

    def find_nothing(*unused, **options):
        raise DataError("no data at nowhere")

    if rank == 1:
        run.Loader = find_nothing


def test_ranks_with_different_settings_are_refused(train):
    ranks = train("run", 2, before=turn_down_the_rate)
    assert ranks.wait(ALIKE_SECONDS + 30) == [2, 2]
    assert ranks.log(0).startswith("error: the ranks have different settings; see whether all nodes have the same")


def turn_down_the_rate(rank):
    if rank == 1:
        sys.argv.append("optimizer.lr=1e-9")


def test_ranks_that_do_not_share_the_runs_folder_are_refused(train):
    ranks = train("run", 2, "out=run", before=stand_elsewhere)
    assert ranks.wait(ALIKE_SECONDS + 30) == [2, 2]
    assert "error: rank 1 doesn't see what rank 0 writes in out = 'run'; set out to a folder on a" in ranks.log(0)


def stand_elsewhere(rank):
    from ternlm.train import pretrain

    pretrain.SHOWN_SECONDS = 0.5
    os.chdir(tempfile.mkdtemp())


def test_a_rank_that_raises_ends_all_with_one_traceback(train):
    ranks = train("run", 4, "sharding.grads=2", steps=1000, before=raise_in_step_3)
    assert ranks.wait() == [1, 1, 1, 1]
    assert "[rank 2] Traceback (most recent call last):" in ranks.log(2)
    assert "[rank 2] ArithmeticError: in step 3" in ranks.log(2)
    for rank in (0, 1, 3):
        assert f"[rank {rank}] ends, since another failed first: rank 2: ArithmeticError" in ranks.log(rank)
        assert "Traceback" not in ranks.log(rank)


def raise_in_step_3(rank):
    from ternlm.train import loop

    train_step = loop.train_step

    def raising(run, microbatches):
        if rank == 2 and run.progress.step == 2:
            raise ArithmeticError("in step 3")
        return train_step(run, microbatches)

    loop.train_step = raising


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_ends_all_within_seconds(tmp_path, train, rank):
    ranks = train("run", 4, "sharding.grads=2", "parallel.timeout_minutes=10", steps=1000)
    wait_for_checkpoint(tmp_path / "run", ranks)
    ranks.send(rank, signal.SIGKILL)
    killed = time.monotonic()
    codes = ranks.wait()
    assert codes[rank] == -signal.SIGKILL
    assert all(code == 1 for other, code in enumerate(codes) if other != rank)
    assert time.monotonic() - killed < 20
    assert any("Traceback" in ranks.log(other) or "hung" in ranks.log(other) for other in range(4))


def test_a_rank_that_hangs_in_its_data_is_shown_and_ended(train):
    ranks = train("run", 2, steps=1000, before=hang_in_data)
    assert ranks.wait(60) == [1, 1]
    assert "Timed out" in ranks.log(0)
    assert "[rank 0] Traceback" in ranks.log(0)
    assert "[rank 1] hung 2 s after another failed, rank 0: " in ranks.log(1)
    assert "in sleeping" in ranks.log(1)


def hang_in_data(rank):
    from ternlm.data.loader import Loader
    from ternlm.parallel import group

    group.GRACE_SECONDS = 2.0
    next_step = Loader.__next__

    def sleeping(loader):
        if rank == 1 and loader.state_dict()["step"] == 2:
            time.sleep(600)
        return next_step(loader)

    Loader.__next__ = sleeping


def test_a_rank_that_never_starts_ends_the_others_in_time(train):
    ranks = train("run", 2, before=never_start)
    ranks.processes[0].join(60)
    assert ranks.processes[0].exitcode == 1
    assert "1/2 clients joined" in ranks.log(0)


def never_start(rank):
    if rank == 1:
        time.sleep(600)


def test_sigterm_to_one_rank_saves_and_ends_all(tmp_path, train):
    ranks = train("run", 4, "sharding.grads=2", steps=1000)
    wait_for_checkpoint(tmp_path / "run", ranks)
    ranks.send(3, signal.SIGTERM)
    assert ranks.wait() == [0, 0, 0, 0], ranks.log(0)
    step = complete_steps(tmp_path / "run")[-1]
    assert f"stopped after step {step}: received SIGTERM" in ranks.log(0)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == step


def test_a_second_sigterm_does_not_harm_the_last_save(tmp_path, train):
    ranks = train("run", 2, "checkpoint.every_steps=0", steps=100_000, before=save_slowly)
    while "step=" not in ranks.log(0):
        assert ranks.running(), ranks.log(0)
        time.sleep(0.02)
    ranks.send(0, signal.SIGTERM)
    while "stopped after step" not in ranks.log(0):
        assert ranks.running(), ranks.log(0)
        time.sleep(0.02)
    ranks.send(0, signal.SIGTERM)
    ranks.send(1, signal.SIGTERM)
    assert ranks.wait() == [0, 0], ranks.log(0)
    assert complete_steps(tmp_path / "run")


def save_slowly(rank):
    from ternlm.checkpoint.save import Saver

    make_folder = Saver._make_folder

    def slow(saver, folder):
        time.sleep(1.0)
        make_folder(saver, folder)

    Saver._make_folder = slow


def test_ranks_that_see_different_checkpoints_are_refused(train):
    assert train("run", 2).wait() == [0, 0]
    ranks = train("run", 2, steps=STEPS + 2, before=overlook_the_newest)
    assert ranks.wait() == [2, 2]
    assert "error: the ranks would go on from different checkpoints (rank 0: " in ranks.log(0)


def overlook_the_newest(rank):
    from ternlm.checkpoint import folders

    steps = folders.complete_steps
    if rank == 1:
        folders.complete_steps = lambda run: steps(run)[:-1]


def torchrun(*words, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **options)


@pytest.mark.slow
def test_torchrun_starts_a_module_and_tells_the_root_cause(tmp_path, data):
    recipe = str(write_recipe(tmp_path / "run", data, STEPS))
    good = torchrun("-m", "ternlm", "train", recipe, cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert good.stdout.count(f"step={STEPS}/{STEPS}") == 1
    assert complete_steps(tmp_path / "run")[-1] == STEPS
    bad = torchrun("-m", "ternlm", "train", recipe, "batch.global_sequences=7", cwd=tmp_path)
    assert bad.returncode == 1
    assert bad.stderr.count("error: batch.global_sequences = 7") == 1
    assert "exitcode  : 2" in bad.stderr
