"""The closed form of a step's traffic against what ranks over gloo really send, layout by layout."""

from contextlib import nullcontext

import pytest
from one_step import OneStep, settings
from ranks import run_ranks
from small_runs import adapters

from ternlm.planner.step_traffic import step_traffic

LAYOUTS = {
    2: {
        "replicated": {"sharding": {"optimizer": 1}},
        "zero1": {},
        "zero1, accumulated": {"microbatches": 3},
        "zero2, accumulated": {"sharding": {"grads": -1}, "microbatches": 3},
        "zero3, accumulated": {"sharding": {"params": -1, "grads": -1}, "microbatches": 3},
        "zero3, bfloat16 reduction": {"sharding": {"params": -1, "grads": -1, "reduce_dtype": "bfloat16"}},
        "muon": {"optimizer": {"kind": "muon"}, "sharding": {"optimizer": 2}},
        "tensor": {"parallel": {"tensor": 2}},
        "tensor without sequence": {"parallel": {"tensor": 2, "sequence": False}},
        "tensor, recomputed": {"parallel": {"tensor": 2}, "compute": {"recompute": 1.0}},
        "tensor, smoothed, tied, q and k norm": {
            "parallel": {"tensor": 2},
            "model": {"tie_word_embeddings": True, "qk_norm": True},
            "loss": {"label_smoothing": 0.1, "chunk_tokens": 50},
        },
        "ring": {"parallel": {"context": 2}, "compute": {"recompute": 0.5}},
        "all to all": {
            "parallel": {"context": 2, "context_method": "all_to_all"},
            "compute": {"recompute": 0.5},
        },
        "1f1b": {"parallel": {"pipeline": 2}, "microbatches": 3},
        "adapters, zero1, accumulated": adapters({"microbatches": 3}),
        "adapters, zero3": adapters({"sharding": {"params": -1, "grads": -1}, "microbatches": 2}, kind="dora"),
        "adapters, tensor, recomputed": adapters(
            {"parallel": {"tensor": 2}, "compute": {"recompute": 1.0}, "microbatches": 2}, kind="dora"
        ),
        "adapters, tensor without sequence": adapters(
            {"parallel": {"tensor": 2, "sequence": False}}, targets=["o_proj", "down_proj"]
        ),
        "adapters, 1f1b": adapters({"parallel": {"pipeline": 2}, "microbatches": 3}),
    },
    4: {
        "zero1 in pairs": {"sharding": {"optimizer": 2}, "microbatches": 3},
        "zero2 in pairs": {"sharding": {"grads": 2, "optimizer": 2}, "microbatches": 3},
        "zero3 in pairs, optimizer over all": {
            "sharding": {"params": 2, "grads": 2, "optimizer": -1},
            "microbatches": 3,
        },
        "gradients in pairs, optimizer over all": {"sharding": {"grads": 2, "optimizer": 4}},
        "tensor, zero1": {"parallel": {"tensor": 2}},
        "context, zero3 in pairs": {
            "parallel": {"context": 2},
            "sharding": {"params": 2, "grads": 2, "optimizer": 2},
            "microbatches": 2,
        },
        "heads exchanged": {
            "parallel": {"context": 2, "context_method": "all_to_all"},
            "sharding": {"optimizer": 2},
        },
        "ring of four": {"parallel": {"context": 4}},
        "muon across": {"optimizer": {"kind": "muon"}, "sharding": {"grads": 2, "optimizer": 4}},
        "1f1b, zero3 in pairs": {
            "parallel": {"pipeline": 2},
            "sharding": {"params": 2, "grads": 2, "optimizer": 2},
            "microbatches": 2,
        },
        "zero bubble in a V, zero1": {
            "model": {"num_hidden_layers": 4},
            "parallel": {
                "allow_untested": True,
                "pipeline": 2,
                "pipeline_schedule": "zero_bubble",
                "stages_per_rank": 2,
            },
            "microbatches": 2,
        },
    },
    8: {
        "optimizer over four of eight": {"sharding": {"grads": 2, "optimizer": 4}},
        "tensor, context, zero3": {
            "parallel": {"tensor": 2, "context": 2},
            "sharding": {"params": 2, "grads": 2, "optimizer": 4},
            "microbatches": 3,
        },
        "tensor, 1f1b, gradients in pairs": {
            "parallel": {"tensor": 2, "pipeline": 2},
            "sharding": {"grads": 2, "optimizer": 2},
            "microbatches": 2,
        },
        "uneven: 90 wide over eight": {"model": {"intermediate_size": 90, "hidden_size": 36, "head_dim": 12}},
    },
}


def steps(cases):
    """Train a step of each case on this rank; return what it sent: as recorded, and as gloo says."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    return {name: step(settings(changes, world), rank, name in WITNESSED) for name, changes in cases.items()}


def step(config, rank, witnessed):
    from torch.profiler import ProfilerActivity, profile

    from ternlm.monitor.collectives import CollectiveRecorder

    run = OneStep(config, rank)
    recorder = CollectiveRecorder(run.mesh, devices_per_node=2)
    if run.mesh.pipeline is not None:
        run.train()  # neighbours greet each other, and ask for the metrics' names, once
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    with profiler if witnessed else nullcontext(), recorder:
        run.train()
    events = profiler.events() if witnessed else []
    events = [(event.name, event.input_shapes) for event in events if event.name.startswith("gloo:")]
    return recorder.totals, [(r.operation, r.payload_bytes, r.ranks) for r in recorder.records], events


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (4, 8))])
def test_the_closed_form_equals_what_gloo_ranks_sent_to_the_byte(world):
    by_rank = run_ranks(world, steps, LAYOUTS[world], timeout=600)
    wrong = {}
    for rank, cases in enumerate(by_rank):
        for name, (totals, records, events) in cases.items():
            config = settings(LAYOUTS[world][name], world)
            expected = step_traffic(config, world, rank, devices_per_node=2)
            if set(totals) != set(expected):
                wrong[name, rank] = {"sent": set(totals) - set(expected), "expected": set(expected) - set(totals)}
            if name in WITNESSED:
                assert what_was_recorded(records) == what_gloo_did(events), name
    assert wrong == {}


# Layouts without groups of one rank, where gloo is asked to reduce too, and sends nothing.
WITNESSED = {
    "zero1 in pairs",
    "gradients in pairs, optimizer over all",
    "context, zero3 in pairs",
    "heads exchanged",
}
FLOATS = 100  # what has fewer elements are the float64 sums of losses


def what_was_recorded(records):
    """Return gloo's name of each operation, and the elements that it is given: it reduce-scatters by an all-reduce."""
    found = []
    for operation, payload_bytes, ranks in records:
        elements = payload_bytes // 4 // (ranks if operation == "all_gather" else 1)
        if elements >= FLOATS:
            found.append(("all_reduce" if operation == "reduce_scatter" else operation, elements))
    return sorted(found)


def what_gloo_did(events):
    found = [(name.removeprefix("gloo:"), sum(_elements(shape) for shape in shapes)) for name, shapes in events]
    return sorted(pair for pair in found if pair[1] >= FLOATS)


def _elements(shape):
    count = 1
    for size in shape:
        count *= size
    return count if shape else 0
