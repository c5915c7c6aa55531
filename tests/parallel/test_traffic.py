"""The closed form of a step's traffic against what ranks over gloo really send, layout by layout."""

import pytest
from ranks import run_ranks

from ternlm.config import config_from_dict
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
        "all to all": {"parallel": {"context": 2, "context_method": "all_to_all"}, "compute": {"recompute": 0.5}},
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
        "context, zero3": {"parallel": {"context": 2}, "sharding": {"params": 2, "grads": 2, "optimizer": 2}},
        "ring of four": {"parallel": {"context": 4}},
        "muon across": {"optimizer": {"kind": "muon"}, "sharding": {"grads": 2, "optimizer": 4}},
    },
    8: {
        "optimizer over four of eight": {"sharding": {"grads": 2, "optimizer": 4}},
        "tensor, context, zero3": {
            "parallel": {"tensor": 2, "context": 2},
            "sharding": {"params": 2, "grads": 2, "optimizer": 4},
            "microbatches": 3,
        },
        "uneven: 90 wide over eight": {"model": {"intermediate_size": 90, "hidden_size": 36, "head_dim": 12}},
    },
}


def settings(changes, world):
    changes = dict(changes)
    table = {
        "model": {
            "vocab_size": 128,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 80,
            "attention_bias": True,
        },
        "data": {"seq_len": 32, "sources": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}]},
        "batch": {"global_sequences": world * changes.pop("microbatches", 1)},
        "train": {"steps": 10},
        "compute": {"dtype": "float32", "compile": "off"},
    }
    for section, fields in changes.items():
        table[section] = {**table.get(section, {}), **fields}
    return config_from_dict(table)


def steps(cases):
    """Train a step of each case on this rank; return what it sent: as recorded, and as gloo says."""
    import torch
    import torch.distributed as dist

    return {
        name: step(settings(changes, dist.get_world_size()), dist.get_rank(), torch.device("cpu"))
        for name, changes in cases.items()
    }


def step(config, rank, device):
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from ternlm.config.layout import resolve_layout
    from ternlm.data.batch import Batch
    from ternlm.monitor.collectives import CollectiveRecorder
    from ternlm.optim.groups import build_optimizers
    from ternlm.parallel.mesh import make_mesh
    from ternlm.parallel.pieces import make_pieces
    from ternlm.train.distributed import build_laid_out, fill_pieces
    from ternlm.train.objective import next_token_loss
    from ternlm.train.precision import autocast
    from ternlm.train.step import accumulate_gradients, update_weights

    layout = resolve_layout(config, dist.get_world_size())
    mesh = make_mesh(layout, rank, device)
    model = build_laid_out(config, mesh, torch.float32, compile_blocks=False)
    pieces = make_pieces(model, mesh, config.parallel.sequence)
    fill_pieces(pieces, config)
    optimizers = build_optimizers(pieces, config.optimizer, mesh)
    loss_fn = next_token_loss(config.loss, torch.ones(config.model.vocab_size, dtype=torch.int32))
    rows, tokens = config.batch.microbatch_sequences, config.data.seq_len
    names = tuple(source.name for source in config.data.sources)
    generator = torch.Generator().manual_seed(layout.place(rank).data)
    batches = []
    for _ in range(config.batch.global_sequences // (rows * layout.data)):
        ids = torch.randint(config.model.vocab_size, (rows, tokens), generator=generator)
        places = torch.arange(tokens).expand(rows, tokens)
        types = torch.zeros(rows, dtype=torch.int64)
        batches.append(Batch(ids, ids, torch.ones(rows, tokens), places, ((tokens,),) * rows, types, names))
    recorder = CollectiveRecorder(mesh, devices_per_node=2)

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler, recorder:
        loss = accumulate_gradients(model, loss_fn, batches, mesh, config, lambda: autocast(device, torch.float32))
        norm = update_weights(pieces, optimizers, mesh, 1.0, loss.divisor)
    assert loss.mean > 0
    assert norm > 0
    events = [(e.name, e.input_shapes) for e in profiler.events() if e.name.startswith("gloo:")]
    return recorder.totals, [(r.operation, r.payload_bytes, r.ranks) for r in recorder.records], events


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_closed_form_equals_what_gloo_ranks_sent_to_the_byte(world):
    by_rank = run_ranks(world, steps, LAYOUTS[world], timeout=300)
    wrong = {}
    for rank, cases in enumerate(by_rank):
        for name, (totals, records, events) in cases.items():
            expected = step_traffic(settings(LAYOUTS[world][name], world), world, rank, devices_per_node=2)
            if {t.kind: t for t in totals} != {t.kind: t for t in expected}:
                wrong[name, rank] = (sorted(totals, key=str), sorted(expected, key=str))
            assert len(events) == len(records), f"{name}: gloo ran another number of operations than were recorded"
    assert wrong == {}


def test_the_recorder_misses_nothing_of_what_gloo_is_asked_to_send():
    cases = {name: LAYOUTS[2][name] for name in ("zero3, accumulated", "ring", "all to all")}
    for name, (_, records, events) in run_ranks(2, steps, cases)[0].items():
        # gloo names what it was asked for, with the elements it was given; it reduce-scatters by an all-reduce.
        given = {"all_gather": lambda n, ranks: n // ranks, "reduce_scatter": lambda n, ranks: n}
        recorded = sorted(
            (
                {"reduce_scatter": "all_reduce"}.get(operation, operation),
                given.get(operation, lambda n, ranks: n)(n // 4, ranks),
            )
            for operation, n, ranks in records
            if n >= 400  # float32; what is smaller are the float64 sums of losses
        )
        asked = sorted(
            (event.removeprefix("gloo:"), sum(_elements(shape) for shape in shapes))
            for event, shapes in events
            if sum(_elements(shape) for shape in shapes) >= 100
        )
        assert recorded == asked, name


def _elements(shape):
    count = 1
    for size in shape:
        count *= size
    return count if shape else 0
