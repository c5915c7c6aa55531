"""A step's time: what must hold of any, and the ancestor's scaling, which has to come out of the model."""

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from planned_runs import internlm, predict
from small_runs import settings

from ternlm.config.layout import resolve_layout
from ternlm.config.section import ConfigError
from ternlm.planner.fitted import fitted_constants
from ternlm.planner.known import find_cluster, make_cluster, sheets
from ternlm.planner.memory import peak_memory
from ternlm.planner.step_time import describe_step, step_time
from ternlm.planner.work import Program

ANCESTOR = Program(fused=False, attention="flash1", broadcasts=True)  # its kernels and its updates, owner by owner
LAYOUTS = {
    "zero1": {"optimizer": 16},
    "zero3 in a node": {"params": 8, "grads": 8, "optimizer": 8},
    "zero3": {"params": 16, "grads": 16, "optimizer": 16},
}


def tokens_per_second(devices, sharding):
    cluster = make_cluster(sheets()["a100"], 8, 400, fitted_constants(), "flash1")
    config = internlm(devices, {**sharding, "reduce_dtype": "bfloat16"})
    seconds = step_time(describe_step(config, resolve_layout(config, devices), 8, ANCESTOR), cluster).seconds
    return config.batch.global_sequences * 2048 / seconds / devices


def test_states_cut_over_all_ranks_lose_two_fifths_at_1024_and_cut_over_a_node_little():
    every = [tokens_per_second(devices, {"optimizer": devices}) for devices in (8, 32, 128, 512, 1024)]
    eight = [tokens_per_second(devices, {"optimizer": 8}) for devices in (8, 32, 128, 512, 1024)]
    assert every[0] == eight[0]  # the same run
    assert every == sorted(every, reverse=True)
    assert 0.53 < every[-1] / every[0] < 0.60  # published: 0.559
    assert 0.85 < eight[-1] / eight[0] < 0.96  # published: 0.889
    losses = [1 - a / b for a, b in zip(every, eight, strict=True)]
    assert losses == sorted(losses)


def test_parts_add_up_and_exposed_communication_is_among_them():
    time = predict(internlm(16, {"optimizer": 16}), 16, find_cluster("a100x8@400"))
    assert time.seconds == pytest.approx(sum(time.parts.values()))
    assert {"matmul", "attention", "other", "optimizer", "overhead"} <= time.parts.keys()
    assert time.exposed
    assert all(seconds > 0 for seconds in time.parts.values())


@pytest.mark.parametrize("sharding", LAYOUTS.values(), ids=LAYOUTS)
@given(slow=st.floats(20, 3200), more=st.floats(1.01, 20))
@effort(max_examples=15, deadline=None)
def test_a_faster_network_never_makes_a_step_slower(sharding, slow, more):
    config, c, sheet = internlm(16, sharding), fitted_constants(), sheets()["a100"]
    step = describe_step(config, resolve_layout(config, 16), 8)
    before, after = (step_time(step, make_cluster(sheet, 8, gbit, c)).seconds for gbit in (slow, slow * more))
    assert after <= before


@pytest.mark.parametrize("field", ["matmul_tflops", "attention_tflops", "attention_backward_tflops", "memory_gb_s"])
@given(more=st.floats(1.01, 10))
@effort(max_examples=15, deadline=None)
def test_a_faster_device_never_makes_a_step_slower(field, more):
    config, cluster = internlm(8, {"params": 8, "grads": 8, "optimizer": 8}), find_cluster("h100x8")
    rates = cluster.rates.model_copy(update={field: getattr(cluster.rates, field) * more})
    step = describe_step(config, resolve_layout(config, 8), 8)
    assert step_time(step, cluster.model_copy(update={"rates": rates})).seconds < step_time(step, cluster).seconds


@given(rows=st.integers(1, 8), recompute=st.sampled_from([0.0, 0.5, 1.0]), tensor=st.sampled_from([1, 2, 4]))
@effort(max_examples=25, deadline=None)
def test_a_larger_microbatch_takes_more_memory_and_gives_no_fewer_tokens_a_second(rows, recompute, tensor):
    found = []
    for count in (rows, 2 * rows):
        sections = {"compute": {"recompute": recompute, "compile": "on"}, "parallel": {"tensor": tensor}}
        config = internlm(8, {"optimizer": 1}, rows=count, **sections)
        layout = resolve_layout(config, 8)
        seconds = step_time(describe_step(config, layout, 8), find_cluster("h100x8")).seconds
        found.append((peak_memory(config, layout).bytes, config.batch.global_sequences / seconds))
    assert found[0][0] < found[1][0]
    assert found[0][1] <= found[1][1]


@given(share=st.floats(0.0, 1.0))
@effort(max_examples=20, deadline=None)
def test_recompute_takes_no_less_time_and_no_more_memory(share):
    plain, again = (internlm(8, compute={"recompute": r, "compile": "on"}) for r in (0.0, share))
    cluster = find_cluster("a100x8")
    assert predict(again, 8, cluster).seconds >= predict(plain, 8, cluster).seconds
    layout = resolve_layout(plain, 8)
    assert peak_memory(again, layout).bytes <= peak_memory(plain, layout).bytes


@given(size=st.sampled_from([2, 4, 8]))
@effort(max_examples=3, deadline=None)
def test_states_cut_finer_take_less_memory(size):
    layouts = [resolve_layout(internlm(8, {"optimizer": n}), 8) for n in (size // 2, size)]
    coarse, fine = (peak_memory(internlm(8), layout).parts["optimizer"] for layout in layouts)
    assert fine == coarse / 2


def test_stages_that_take_turns_shorten_the_bubble_and_hide_what_is_exchanged_once():
    changes = {"parallel": {"pipeline": 4}, "compute": {"compile": "on"}}
    plain = settings(changes, 64, {"preset": "internlm-7b"})
    changes["parallel"] |= {"pipeline_schedule": "interleaved", "stages_per_rank": 4}
    turns = settings(changes, 64, {"preset": "internlm-7b"})
    before, after = (predict(config, 32, find_cluster("h100x8@400")) for config in (plain, turns))
    # A fourth, but for the messages of four stages instead of one.
    assert before.parts["bubble"] / 4 < after.parts["bubble"] < before.parts["bubble"] / 2
    once = "all_gather over shard"
    assert after.parts.get(once, 0.0) < before.parts[once]


def test_a_cluster_without_a_network_is_refused_where_a_group_needs_one():
    cluster = find_cluster("h100x8")
    alone = cluster.model_copy(update={"links": cluster.links.model_copy(update={"network_gb_s": 0.0})})
    assert predict(internlm(8), 8, alone).seconds > 0
    with pytest.raises(ConfigError, match=r"links\.network_gb_s = 0 and axis shard lies on several nodes.*give"):
        predict(internlm(16, {"optimizer": 16}), 16, alone)
