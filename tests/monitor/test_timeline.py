import json

import torch

from ternlm.monitor.timeline import NominalRates, Timeline
from ternlm.planner.traffic import Traffic

RATES = NominalRates(flops=1e6, memory_bytes=1e12, bytes_in_node=1e6, bytes_between_nodes=1e3)


def spans(trace, track):
    threads = {e["args"]["name"]: e["tid"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    return [e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == threads[track]]


def recorded(tmp_path, about=None):
    timeline = Timeline(RATES)
    with timeline:
        timeline.phase("forward")
        torch.ones(10, 10) @ torch.ones(10, 10)
        timeline.memory({"parameters": 100, "activations": 50})
        timeline.collective(Traffic("all_gather", "shard", 2, False, 2000))
        timeline.collective(Traffic("all_reduce", "shard", 2, False, 1000))
        timeline.phase("backward")
        torch.ones(10, 10) @ torch.ones(10, 10)
        timeline.collective(Traffic("all_reduce", "replicas", 2, True, 1000))
        timeline.phase(None)
    timeline.write(tmp_path / "trace.json", about or {})
    return timeline, json.loads((tmp_path / "trace.json").read_text())


def test_the_clock_runs_by_operations_over_the_stated_rate(tmp_path):
    timeline, trace = recorded(tmp_path)
    assert timeline.flops == 2 * 2000
    assert abs(timeline.seconds - 4e-3) < 1e-6
    assert [(e["name"], round(e["dur"])) for e in spans(trace, "program")] == [("forward", 2000), ("backward", 2000)]


def test_collectives_of_one_axis_queue_and_others_overlap(tmp_path):
    _, trace = recorded(tmp_path)
    first, second = spans(trace, "shard (inside a node)")
    (between,) = spans(trace, "replicas (between nodes)")
    assert [e["name"] for e in (first, second)] == ["all_gather", "all_reduce"]
    assert round(first["ts"]) == 2000
    assert round(second["ts"]) == round(first["ts"] + first["dur"])
    assert round(between["ts"]) == 4000
    assert round(between["dur"]) == 1_000_000
    assert between["args"] == {"payload_bytes": 1000, "sent_bytes": 1000, "ranks": 2}


def test_memory_is_a_counter_by_kind_and_the_file_says_what_its_times_are(tmp_path):
    _, trace = recorded(tmp_path, {"world": 1024})
    (counter,) = [e for e in trace["traceEvents"] if e["ph"] == "C"]
    assert counter["args"] == {"parameters": 100, "activations": 50}
    assert trace["otherData"]["world"] == 1024
    assert trace["otherData"]["rates_per_second"]["flops"] == 1e6
    assert "nominal" in trace["traceEvents"][0]["args"]["name"]


def test_small_changes_of_memory_are_left_out(tmp_path):
    timeline = Timeline(RATES)
    for total in (10_000, 10_005, 10_100):
        timeline.memory({"activations": total})
    timeline.write(tmp_path / "trace.json", {})
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["args"]["activations"] for e in events if e["ph"] == "C"] == [10_000, 10_100]


def test_operators_without_a_formula_can_be_given_one():
    timeline = Timeline(RATES, {"aten::relu": lambda x: 7.0})
    with timeline:
        torch.ones(3).relu()
    assert timeline.flops == 7
