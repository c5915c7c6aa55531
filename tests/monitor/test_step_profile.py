"""A step's time by parts: against the profiler's own sums on a CPU, and to the microsecond on a made-up CUDA trace."""

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ternlm.config.layout import Layout, Place
from ternlm.monitor import step_profile
from ternlm.monitor.step_profile import StepProfile, step_parts
from ternlm.parallel.mesh import one_rank
from ternlm.parallel.spans import OPTIMIZER, exchange

CPU = one_rank(torch.device("cpu"))


def train(model, optimizer, x):
    model(x).square().mean().backward()
    with record_function(OPTIMIZER):
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(512, 256)
    train(model, optimizer, x)
    return model, optimizer, x


def test_parts_on_a_cpu_are_the_profilers_own_sums(small, monkeypatch):
    kept = []
    real = step_profile.step_parts
    monkeypatch.setattr(step_profile, "step_parts", lambda events, mesh: kept.append(events) or real(events, mesh))
    watched = StepProfile(CPU)
    watched.start()
    began = time.perf_counter()
    train(*small)
    seconds = time.perf_counter() - began
    parts = watched.stop()
    assert sum(parts.values()) == pytest.approx(seconds, rel=0.1)
    assert set(parts) == {"matmul", "other", "optimizer", "launch"}
    # The events once more, by another way: an operator's duration less those of the operators right within it.
    (events,) = kept
    ops = [e for e in events if e.get("ph") == "X" and e["cat"] == "cpu_op"]

    def own(event):
        end = event["ts"] + event["dur"]
        inside = [o for o in ops if o is not event and event["ts"] <= o["ts"] and o["ts"] + o["dur"] <= end]
        direct = [o for o in inside if not any(p is not o and _holds(p, o) for p in inside)]
        return event["dur"] - sum(o["dur"] for o in direct)

    products = [e for e in ops if e["name"] in ("aten::mm", "aten::addmm")]
    assert len(products) == 5  # two forward, three backward: x needs no gradient
    held = sum(e["dur"] for e in products)  # copies that a product makes are part of it
    assert parts["matmul"] == pytest.approx(held * 1e-6, rel=1e-6)
    assert sum(map(own, products)) <= held * (1 + 1e-9)


def _holds(outer, inner):
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_a_range_of_an_exchange_takes_what_happens_and_is_waited_for_within(small):
    watched = StepProfile(CPU)
    watched.start()
    train(*small)
    with exchange("all_reduce", "tensor"):
        torch.ones(10).sum()
        time.sleep(0.05)
    time.sleep(0.03)
    parts = watched.stop()
    assert 0.05 < parts["all_reduce over tensor"] < 0.07
    assert 0.03 < parts["launch"] < 0.05


def test_attention_and_what_it_calls_are_one_part():
    q = torch.randn(1, 4, 256, 64, requires_grad=True)
    watched = StepProfile(CPU)
    watched.start()
    torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    parts = watched.stop()
    assert parts["attention"] > parts["other"]
    assert "matmul" not in parts


def test_a_step_cut_short_leaves_no_profiler_running(small):
    watched = StepProfile(CPU)
    watched.start()
    watched.close()
    watched.close()
    with pytest.raises(RuntimeError, match="call start"):
        watched.stop()
    with profile(activities=[ProfilerActivity.CPU]):  # would raise if another were active
        train(*small)


CUDA = dataclasses.replace(
    CPU,
    device=torch.device("cuda"),
    layout=Layout(4, params=4, grads=4, optimizer=4),
    place=Place(),
    shard=SimpleNamespace(group_name="7"),
)


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def launch(ts, correlation, tid=1):
    return event("cuda_runtime", "cudaLaunchKernel", ts, 1, tid, correlation=correlation)


def kernel(name, ts, dur, stream=7, **args):
    return event("kernel", name, ts, dur, f"stream {stream}", **args)


def gather(ts, dur):
    nccl = {"Collective name": "_allgather_base", "Process Group Name": "7"}
    return kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", ts, dur, stream=20, **nccl)


def test_on_cuda_a_moment_belongs_to_what_computes_and_only_exposed_exchange_counts(monkeypatch):
    monkeypatch.setattr(step_profile, "axis_names", lambda mesh: {"7": "shard"})
    events = [
        event("user_annotation", "ternlm step", 0, 1000),
        # The host: a product, attention in the thread of backward, norm, update.
        event("cpu_op", "aten::mm", 5, 10),
        launch(8, 1),
        event("cpu_op", "GeneratedBackwardFor_ternlm_segment_attention_default", 20, 20, tid=2),
        event("cpu_op", "aten::_flash_attention_backward", 22, 10, tid=2),
        launch(25, 2, tid=2),
        event("cpu_op", "aten::rms_norm", 50, 10),
        launch(55, 3),
        event("user_annotation", OPTIMIZER, 70, 30),
        event("cpu_op", "aten::_fused_adamw_", 75, 20),
        launch(80, 4),
        # The device, later: nothing up to 100; the first gather hides behind the product but for 50 of its 150.
        gather(100, 150),
        kernel("nvjet_tst_128x256", 150, 200, correlation=1),
        kernel("flash_bwd_kernel", 350, 100, correlation=2),
        gather(460, 40),
        kernel("triton_red_fused", 500, 50, correlation=3),
        kernel("multi_tensor_apply_kernel", 600, 100, correlation=4),
        {"ph": "i", "name": "an instant"},
    ]
    found = {name: round(seconds * 1e6, 3) for name, seconds in step_parts(events, CUDA).items()}
    assert found == {
        "all_gather over shard": 50 + 40,
        "matmul": 200,
        "attention": 100,
        "other": 50,
        "optimizer": 100,
        "launch": 100 + 10 + 50 + 300,
    }


def test_kernels_that_overlap_or_leave_the_step_count_once_and_within_it(monkeypatch):
    monkeypatch.setattr(step_profile, "axis_names", lambda mesh: {})
    events = [
        event("user_annotation", "ternlm step", 100, 100),
        event("cpu_op", "aten::mm", 105, 10),
        launch(106, 1),
        kernel("left over from before", 50, 60, correlation=99),
        kernel("gemm", 120, 60, correlation=1),
        kernel("elementwise", 150, 50, stream=8, correlation=98),
        gather(190, 40),
    ]
    found = {name: round(seconds * 1e6, 3) for name, seconds in step_parts(events, CUDA).items()}
    assert sum(found.values()) == 100
    assert found == {"other": 10 + 20, "launch": 10, "matmul": 60}


def test_messages_that_were_sent_in_one_call_are_told_by_where_they_were_sent(monkeypatch):
    monkeypatch.setattr(step_profile, "axis_names", lambda mesh: {})
    ring = [
        event("user_annotation", "ternlm step", 0, 100),
        event("user_annotation", "send over context", 5, 10),
        launch(8, 1),
        kernel("ncclDevKernel_SendRecv", 0, 100, correlation=1),
    ]
    assert list(step_parts(ring, CUDA)) == ["send over context"]
    piped = dataclasses.replace(CUDA, pipeline=SimpleNamespace(group_name="9"))
    message = kernel("ncclDevKernel_SendRecv", 0, 100, correlation=1)
    assert list(step_parts([ring[0], message], piped)) == ["send over pipeline"]


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "_reduce_scatter_base", "reduce_scatter over shard"),
        ("ncclDevKernel_AllReduce_Sum_f32_TREE_LL", "allreduce", "all_reduce over shard"),
        ("ncclDevKernel_SendRecv", "recv", "send over shard"),
        ("ncclDevKernel_SendRecv", "all_to_allv", "all_to_all over shard"),
        ("ncclDevKernel_Broadcast_RING_LL", "broadcast", "broadcast over shard"),
    ],
)
def test_collectives_are_named_as_the_planner_names_them(monkeypatch, name, said, expected):
    monkeypatch.setattr(step_profile, "axis_names", lambda mesh: {"7": "shard"})
    nccl = kernel(name, 0, 100, **{"Collective name": said, "Process Group Name": "7"})
    found = step_parts([event("user_annotation", "ternlm step", 0, 100), nccl], CUDA)
    assert list(found) == [expected]
