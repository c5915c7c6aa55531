"""Measured parts of a step beside predicted ones, and what is said of those that are off."""

import pytest

from ternlm.config.layout import Layout
from ternlm.planner.compare import comparable, compare, memory_alarm
from ternlm.planner.memory import GIB, Memory

PLANNED = {"matmul": 0.6, "attention": 0.2, "other": 0.1, "launch": 0.02, "overhead": 0.03, "optimizer": 0.05}


def test_parts_that_a_profile_cant_tell_apart_are_one():
    parts = {"launch": 1.0, "overhead": 2.0, "bubble": 3.0, "send over pipeline": 4.0, "send over context": 5.0}
    assert comparable(parts) == {"idle": 3.0, "pipeline": 7.0, "send over context": 5.0}


def test_a_step_as_predicted_gives_no_alarm():
    measured = {**PLANNED, "matmul": 0.65}
    found = compare(PLANNED, [measured], Layout(1), 0, bound=0.1)
    assert found.alarms() == []
    assert found.planned == pytest.approx(1.0)
    assert found.measured == pytest.approx(1.05)
    assert found.metrics()["step/matmul_s"] == 0.65
    assert found.metrics()["planned/idle_s"] == pytest.approx(0.05)


def test_the_alarm_names_the_parts_that_are_off_the_worst_first():
    measured = {**PLANNED, "attention": 0.5, "matmul": 0.75, "other": 0.19}
    found = compare(PLANNED, [measured], Layout(1), 0, bound=0.1)
    assert [part.name for part in found.deviating] == ["attention", "matmul"]  # `other` is off by 9% of the step
    first, second = found.alarms()
    assert first.startswith("attention took 500 ms, 30% of a step longer than the 200 ms predicted (rank 0)")
    assert second.startswith("matmul took 750 ms")


def test_a_part_that_is_too_fast_means_that_the_cluster_file_is_wrong():
    (alarm,) = compare(PLANNED, [{**PLANNED, "matmul": 0.3}], Layout(1), 0, bound=0.1).alarms()
    assert "30% of a step shorter" in alarm
    assert "tern calibrate" in alarm


def test_a_part_that_wasnt_predicted_is_named_too():
    measured = {**PLANNED, "all_reduce over replicas": 0.4}
    (alarm,) = compare(PLANNED, [measured], Layout(1), 0, bound=0.1).alarms()
    assert alarm.startswith("all_reduce over replicas took 400 ms")
    assert "links" in alarm


def test_a_slow_rank_is_named_and_its_wait_is_no_fault_of_the_links():
    planned = {**PLANNED, "all_gather over shard": 0.1}
    usual = {**planned, "all_gather over shard": 0.5}  # each waits 0.4 s for rank 2
    slow = {**planned, "matmul": 1.0}
    found = compare(planned, [usual, usual, slow, usual], Layout(4, params=4, grads=4, optimizer=4), 0, bound=0.1)
    by_name = {part.name: part for part in found.parts}
    assert by_name["all_gather over shard"].measured == pytest.approx(0.1)  # the last to come waits for nobody
    assert by_name["matmul"].measured == 1.0
    assert by_name["matmul"].rank == 2
    assert by_name["waiting"].measured == pytest.approx(0.3)  # of four ranks in the mean
    assert by_name["waiting"].rank == 2
    assert [part.name for part in found.deviating] == ["matmul", "waiting"]


def test_in_a_pipeline_a_rank_without_work_is_one_part_whatever_it_waits_for():
    planned = {**PLANNED, "bubble": 0.2, "send over pipeline": 0.1}
    measured = {"matmul": 0.6, "attention": 0.2, "other": 0.1, "optimizer": 0.05, "bubble": 0.35}
    found = compare(planned, [measured, measured], Layout(2, pipeline=2), 0, bound=0.01)
    assert found.alarms() == []
    assert {part.name: part.planned for part in found.parts}["pipeline"] == pytest.approx(0.35)


def test_an_exchange_names_no_rank():
    """Where it takes long, a rank waits for others: it would be the wrong one."""
    planned = {**PLANNED, "all_gather over shard": 0.1}
    measured = {**PLANNED, "all_gather over shard": 0.5}
    layout = Layout(2, params=2, grads=2, optimizer=2)
    (alarm,) = compare(planned, [measured, measured], layout, 0, bound=0.1).alarms()
    assert "rank" not in alarm


def test_only_ranks_of_the_stage_that_the_prediction_is_of_are_compared():
    layout = Layout(4, pipeline=2)
    assert [layout.place(rank).pipeline for rank in range(4)] == [0, 0, 1, 1]
    other = {**PLANNED, "matmul": 9.0}
    found = compare(PLANNED, [other, other, PLANNED, PLANNED], layout, 1, bound=0.1)
    assert found.alarms() == []


def test_memory_is_warned_of_beyond_the_bound_without_its_reserve():
    memory = Memory({"weights": 2 * GIB, "activations": 6 * GIB, "reserve": 4 * GIB}, 0, 1.0, 1.0, 0.0, 1.0)
    assert memory_alarm(8.7 * GIB, memory, 0.1) is None
    alarm = memory_alarm(10 * GIB, memory, 0.1)
    assert alarm is not None
    assert alarm.startswith(
        "tensors have taken up to 10 GiB, 25% more than the 8 GiB predicted (most of it activations 6"
    )


def test_the_table_has_every_part_and_the_step():
    table = compare(PLANNED, [{**PLANNED, "matmul": 0.7}], Layout(1), 0, bound=0.1).table().splitlines()
    assert [line.split()[0] for line in table] == ["part", "matmul", "attention", "other", "idle", "optimizer", "step"]
    assert table[1].split() == ["matmul", "700.0", "600.0", "+10.0%"]
    assert table[-1].split()[-1] == "+10.0%"
