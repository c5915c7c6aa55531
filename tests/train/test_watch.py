"""Steps held against the planner's prediction while a run trains: what is reported, when, and which part is named."""

import json
import logging
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ternlm.config.layout import resolve_layout
from ternlm.config.section import ConfigError
from ternlm.parallel.mesh import make_mesh
from ternlm.planner.known import find_cluster
from ternlm.train import run as run_module
from ternlm.train import step as step_module
from ternlm.train.loop import train_loop
from ternlm.train.pretrain import pretrain
from ternlm.train.report import Reporter
from ternlm.train.run import set_up
from ternlm.train.watch import PlanWatch

# About this machine's; the tests' bounds are wide enough for any.
CLUSTER = """
name = "test"
device = "test"
memory_gib = 4
peak_tflops = 0.1
dtype = "float32"
[rates]
matmul_tflops = 0.02
attention_tflops = 0.005
attention_backward_tflops = 0.005
memory_gb_s = 1
serial_us = 20
"""


@pytest.fixture
def cluster(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)
    return str(path)


def watched(make_config, cluster, **sections):
    monitor = {"plan_every_steps": 2, "plan_bound": 20.0, "progress": "off", **sections.pop("monitor", {})}
    return make_config(monitor=monitor, parallel={"cluster": cluster}, **sections)


def test_every_n_steps_a_steps_parts_stand_beside_their_predictions(make_config, cluster, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        pretrain(watched(make_config, cluster, train={"steps": 7}))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    compared = {row["step"]: row for row in rows if "planned/step_s" in row}
    assert list(compared) == [4, 6]  # the first two of a process warm up
    for row in compared.values():
        parts = {name for name in row if name.startswith("step/")} - {"step/profiled_s"}
        assert {"step/matmul_s", "step/attention_s", "step/other_s", "step/optimizer_s", "step/idle_s"} <= parts
        assert sum(row[name] for name in parts) == pytest.approx(row["step/profiled_s"])
        assert 0 < row["step/profiled_s"] <= row["time/step_s"]
        assert 0 < row["planned/peak_gib"] < 1
        others = ("planned/step_s", "planned/peak_gib")
        planned = sum(value for name, value in row.items() if name.startswith("planned/") and name not in others)
        assert planned == pytest.approx(row["planned/step_s"])
    assert "a step of" in caplog.text
    assert "predicted on test" in caplog.text
    assert not [record for record in caplog.records if "isn't as predicted" in record.message]


def test_a_part_that_takes_longer_than_predicted_is_named(make_config, cluster, caplog, monkeypatch):
    real = step_module.scale_gradients

    def slow(*given):
        time.sleep(0.5)
        real(*given)

    monkeypatch.setattr(step_module, "scale_gradients", slow)
    pretrain(watched(make_config, cluster, train={"steps": 4}))
    (alarm,) = [record.message for record in caplog.records if "isn't as predicted" in record.message]
    assert alarm.startswith("step 4 isn't as predicted: optimizer took 5")
    assert "longer than" in alarm
    assert "memory bandwidth" in alarm


def test_documents_count_with_their_own_lengths(make_config, cluster, tmp_path):
    def planned(name, **data):
        pretrain(watched(make_config, cluster, out=name, train={"steps": 4}, data=data))
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return next(row["planned/attention_s"] for row in rows if "planned/step_s" in row)

    assert planned("documents") < planned("across", packing="across")


def test_training_is_the_same_with_a_watch(make_config, cluster):
    plain = pretrain(make_config(out="plain"))
    seen = pretrain(watched(make_config, cluster, out="seen"))
    for one, other in zip(plain.model.parameters(), seen.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_profile_that_cant_be_read_doesnt_end_the_run(make_config, cluster, caplog, monkeypatch):
    def full(profile, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", full)
    run = pretrain(watched(make_config, cluster, train={"steps": 5}))
    assert run.progress.step == 5
    assert "step 4 was profiled in vain: [Errno 28] No space left on device" in caplog.text


def test_what_cant_be_predicted_is_refused_at_once(make_config, cluster, tmp_path):
    with pytest.raises(ConfigError, match=r"plan_every_steps doesn't know the device 'cpu'; set parallel.cluster"):
        pretrain(make_config(monitor={"plan_every_steps": 5}))
    with pytest.raises(ConfigError, match=r"compute.dtype = 'bfloat16' can't be planned for"):
        pretrain(watched(make_config, cluster, compute={"dtype": "bfloat16"}))
    with pytest.raises(ConfigError, match=r"plan_bound.*plan_every_steps = 0"):
        make_config(monitor={"plan_bound": 0.2})
    assert not (tmp_path / "run").exists()


LINKS = "[links]\nnode_gb_s = 1\ncontention = 1\n"


def compared_ranks(config, cluster_path):
    """Train with rank 1 half a second slower in each step; return what each rank found of the last."""
    run_module.find_tokenizer = lambda data: None  # these data have no text behind them
    mesh = make_mesh(resolve_layout(config, 2), dist.get_rank(), torch.device("cpu"))
    run = set_up(config, mesh=mesh)
    watch = PlanWatch(run, find_cluster(cluster_path))
    found = []
    real = watch.compare
    watch.compare = lambda measured: found.append(real(measured)) or found[-1]
    if mesh.place.rank == 1:
        forward = run.model.forward

        def slow(*given):
            time.sleep(0.5)
            return forward(*given)

        run.model.forward = slow
    train_loop(run, run.loader, Reporter(run, [], 0.1), [watch.every(lambda step: step == 4)])
    run.loader.close()
    (comparison,) = found
    return {part.name: (part.measured, part.planned, part.rank) for part in comparison.parts}


def train_with_saves(config, cluster_path):
    mesh = make_mesh(resolve_layout(config, 2), dist.get_rank(), torch.device("cpu"))
    run_module.find_tokenizer = lambda data: None
    run = set_up(config, mesh=mesh)
    watch = PlanWatch(run, find_cluster(cluster_path))
    train_loop(run, run.loader, Reporter(run, [], 0.1), [watch.every(lambda step: True)])
    run.loader.close()
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir())


def test_steps_are_compared_while_checkpoints_are_written(make_config, cluster, tmp_path):
    """Saves exchange objects between ranks in a thread of their own; the two must not get each other's."""
    (tmp_path / "cluster.toml").write_text("devices_per_node = 2\n" + CLUSTER + LINKS)
    sharding = {"params": 2, "grads": 2, "optimizer": 2}
    checkpoint = {"every_steps": 1, "keep_last": 100}
    config = watched(make_config, cluster, train={"steps": 16}, sharding=sharding, checkpoint=checkpoint)
    first, second = run_ranks(2, train_with_saves, config, cluster)
    assert first == second == [f"step-{step:08d}" for step in range(1, 17)]


def test_of_two_ranks_the_slow_one_is_named_and_both_find_the_same(make_config, cluster, tmp_path):
    (tmp_path / "cluster.toml").write_text("devices_per_node = 2\n" + CLUSTER + LINKS)
    sharding = {"params": 2, "grads": 2, "optimizer": 2}
    config = watched(make_config, cluster, train={"steps": 4}, sharding=sharding)
    first, second = run_ranks(2, compared_ranks, config, cluster)
    assert first == second
    assert {"all_gather over shard", "reduce_scatter over shard", "all_reduce over shard", "waiting"} <= set(first)
    measured, _, rank = first["waiting"]
    assert rank == 1  # for which the other waits, half a second: the mean is half of it
    assert 0.2 < measured < 0.4
    assert first["idle"][2] == 1
    assert 0.5 < first["idle"][0] < 0.7
    assert first["all_gather over shard"][0] < 0.2  # the wait isn't counted as the exchange's own time
    assert first["all_gather over shard"][1] > 0
