import json
import subprocess
import sys

import pytest
import small_runs
import torch
import torch.distributed as dist
from small_runs import adapters

from ternlm.config.layout import resolve_layout
from ternlm.config.section import ConfigError
from ternlm.config.stages import own_stages
from ternlm.planner.step_traffic import parameters, step_traffic
from ternlm.train.simulate import simulate

MODEL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 90,
    "attention_bias": True,
}


def settings(changes=None, sequences=16):
    data = {"seq_len": 64, "sources": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}]}
    return small_runs.settings({"data": data, **(changes or {})}, sequences, MODEL)


FOUR = {"num_hidden_layers": 4}
ZERO3 = {"sharding": {"params": -1, "grads": -1}}
ATTENTION_LAST = ["o_proj", "up_proj"]
IN_TURN = {"pipeline": 2, "stages_per_rank": 2}
LAYOUTS = {
    "zero3 in a node, optimizer over all": (32, {"sharding": {"params": 4, "grads": 4, "optimizer": -1}}),
    "heads exchanged": (8, {"parallel": {"context": 2, "context_method": "all_to_all"}}),
    "adapters, zero3": (8, adapters(ZERO3)),
    "adapters, tensor": (2, adapters({"parallel": {"tensor": 2}}, kind="dora")),
    "tensor, 1f1b, zero1": (16, {"parallel": {"tensor": 2, "pipeline": 2}, "sharding": {"optimizer": 2}}),
}
MORE_LAYOUTS = {
    "adapters, zero1, dora": (8, adapters(kind="dora")),
    "adapters, replicated": (8, adapters({"sharding": {"optimizer": 1}})),
    "adapters in fours, optimizer over all": (
        16,
        adapters({"sharding": {"params": 4, "grads": 4, "optimizer": -1}}, kind="dora", base="float32"),
    ),
    "adapters, in 4 bits": (8, adapters(ZERO3, base="nf4")),
    "adapters, tensor, recomputed": (
        8,
        adapters({"parallel": {"tensor": 2}, "compute": {"recompute": 1.0}}, kind="dora"),
    ),
    "adapters, tensor, some matrices": (2, adapters({"parallel": {"tensor": 2}}, targets=ATTENTION_LAST)),
    "adapters, tensor, float32 base": (
        2,
        adapters({"parallel": {"tensor": 2, "sequence": False}}, targets=["down_proj"], base="float32"),
    ),
    "adapters, ring, half recomputed": (8, adapters({"parallel": {"context": 2}, "compute": {"recompute": 0.5}})),
    "adapters, 1f1b": (8, adapters({"parallel": {"pipeline": 2}})),
    "adapters, zero bubble in a V": (
        8,
        adapters({"model": FOUR, "parallel": {**IN_TURN, "pipeline_schedule": "zero_bubble"}}),
    ),
    "replicated": (16, {"sharding": {"optimizer": 1}}),
    "zero1 in a node": (32, {"sharding": {"optimizer": 8}}),
    "zero1, accumulated": (8, {}),
    "zero3, accumulated": (8, {"sharding": {"params": -1, "grads": -1}}),
    "gradients in fours, optimizer over sixteen": (32, {"sharding": {"grads": 4, "optimizer": 16}}),
    "muon": (8, {"optimizer": {"kind": "muon"}, "sharding": {"grads": 2, "optimizer": 4}}),
    "tensor, half recomputed": (8, {"parallel": {"tensor": 2}, "compute": {"recompute": 0.5}}),
    "tensor without sequence": (8, {"parallel": {"tensor": 2, "sequence": False}, "compute": {"recompute": 1.0}}),
    "ring": (8, {"parallel": {"context": 4}, "compute": {"recompute": 0.5}}),
    "1f1b, recomputed": (
        8,
        {"model": FOUR, "parallel": {"pipeline": 4}, "sharding": {"optimizer": 2}, "compute": {"recompute": 1.0}},
    ),
    "1f1b, gradients cut": (16, {"parallel": {"pipeline": 2}, "sharding": {"grads": 4, "optimizer": 4}}),
    "interleaved": (8, {"model": FOUR, "parallel": {**IN_TURN, "pipeline_schedule": "interleaved"}}),
    "zero bubble in a V": (8, {"model": FOUR, "parallel": {**IN_TURN, "pipeline_schedule": "zero_bubble"}}),
    "tensor, pipeline, context": (
        16,
        {"parallel": {"tensor": 2, "pipeline": 2, "context": 2}, "sharding": {"params": 2, "grads": 2, "optimizer": 4}},
    ),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_LAYOUTS)])
def test_the_simulated_step_sends_what_the_closed_form_says_to_the_byte(name):
    world, changes = {**LAYOUTS, **MORE_LAYOUTS}[name]
    parallel = changes.get("parallel", {})
    shared = parallel.get("tensor", 1) * parallel.get("context", 1) * parallel.get("pipeline", 1)
    microbatches = 4 if "pipeline" in parallel else 2
    config = settings(changes, world // shared * microbatches)
    layout = resolve_layout(config, world)
    for rank in (0, world - 1) if layout.pipeline > 1 else (world - 1,):
        expected = set(step_traffic(config, world, rank, devices_per_node=8))
        sent = set(simulate(config, world, rank, devices_per_node=8).traffic)
        assert (sent - expected, expected - sent) == (set(), set())


@pytest.mark.parametrize("sharding", [{"optimizer": 8}, {"params": 8, "grads": 8, "optimizer": 16}])
def test_states_take_what_their_shapes_say(sharding):
    config = settings({"sharding": sharding})
    simulation = simulate(config, 16, rank=3)
    layout, rank = simulation.layout, 3
    weights = states = gathered = 0
    for parameter in (parameter for unit in parameters(config.model) for parameter in unit):
        rows = -(-parameter.shape[0] // layout.shard)  # FSDP pads to whole rows
        own = min(max(parameter.shape[0] - rank % layout.shard * rows, 0), rows)
        piece = -(-own // layout.across)
        weights += rows * parameter.row * 4
        gathered += rows * layout.shard * parameter.row * 2
        states += 2 * min(max(own - rank // layout.shard * piece, 0), piece) * parameter.row * 4 + 4
    resting = simulation.resting_bytes
    assert resting["parameters"] == weights
    assert resting["optimizer"] == states
    assert resting["gradients"] == resting["gathered"] == resting["logits"] == resting["communication"] == 0
    assert resting["activations"] < 2**12
    if not layout.reshard:
        assert simulation.peak_bytes["gathered"] == gathered
    assert simulation.peak_bytes["parameters"] == weights


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}])
def test_whole_gradients_that_wait_for_the_last_microbatch_are_counted_as_gradients(parallel):
    config = settings({"sharding": {"optimizer": 8}, "parallel": parallel}, sequences=64)
    simulation = simulate(config, 16)
    assert simulation.microbatches >= 4
    stages = own_stages(config, simulation.layout.pipeline, simulation.place.pipeline)
    held = [*stages[0].layers] if parallel else range(config.model.num_hidden_layers)
    embedding, *blocks, norm, head = parameters(config.model)
    units = [embedding, *(blocks[layer] for layer in held), *([] if parallel else [norm, head])]
    whole = 4 * sum(parameter.shape[0] * parameter.row for unit in units for parameter in unit)
    logits_gradient = 4 * config.model.vocab_size * config.model.hidden_size
    # The newest microbatch's own, in bfloat16, are there one block at a time.
    assert whole <= simulation.peak_bytes["gradients"] <= whole + logits_gradient + whole / 8
    if not parallel:
        once = simulate(settings({"sharding": {"optimizer": 8}}, sequences=16), 16)
        batches = 3 * 2**11  # of the other microbatches: ids, targets, positions, weights, types, sums
        assert simulation.peak_bytes["activations"] <= once.peak_bytes["activations"] + batches


def test_recompute_and_sequence_parallelism_lower_the_activations():
    def activations(**changes):
        return simulate(settings(changes, sequences=4), 4).peak_bytes["activations"]

    tensor = {"tensor": 2, "sequence": False}
    assert activations(compute={"dtype": "bfloat16", "recompute": 1.0}) < activations()
    assert activations(parallel={"tensor": 2}) < activations(parallel=tensor) < activations()


def test_an_earlier_pipeline_rank_holds_more_microbatches():
    config = settings({"model": FOUR, "parallel": {"pipeline": 4}, "sharding": {"optimizer": 2}}, sequences=8)
    first, third = simulate(config, 8, rank=0), simulate(config, 8, rank=4)
    assert first.microbatches == third.microbatches == 4
    assert first.peak_bytes["activations"] > 1.5 * third.peak_bytes["activations"]


def test_the_timeline_has_the_steps_phases_and_an_own_track_for_each_axis(tmp_path):
    path = tmp_path / "trace.json"
    simulation = simulate(settings({"parallel": {"tensor": 2}, "sharding": {"optimizer": 8}}, 32), 64)
    simulation.write_timeline(path)
    trace = json.loads(path.read_text())
    tracks = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    names = [e["name"] for e in trace["traceEvents"] if e["ph"] == "X" and tracks[e["tid"]] == "program"]
    assert names == ["forward", "backward", "update"]
    assert {"tensor (inside a node)", "shard (between nodes)", "replicas (between nodes)"} <= set(tracks.values())
    collectives = sum(e["ph"] == "X" and "payload_bytes" in e.get("args", {}) for e in trace["traceEvents"])
    assert collectives == sum(traffic.count for traffic in simulation.traffic)
    peak = max(sum(e["args"].values()) for e in trace["traceEvents"] if e["ph"] == "C")
    assert abs(peak / sum(simulation.peak_bytes.values()) - 1) < 1e-3


def test_the_operations_are_those_of_the_planner():
    from ternlm.planner.flops import training_flops

    config = settings()
    simulation = simulate(config, 16)
    tokens = config.data.seq_len
    assert simulation.microbatches == 1
    counted = training_flops(config.model, tokens, tokens**2).causal
    # The kernel's backward computes the scores once more: 5 products where the convention counts 4.
    attention = 4 * config.model.num_attention_heads * config.model.head_size * config.model.num_hidden_layers
    assert simulation.flops == counted + attention * tokens**2 / 4


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_of_a_run_of_adapters_the_optimizer_holds_the_adapters_alone(kind):
    simulation = simulate(settings(adapters(kind=kind)), 1)
    config = settings(adapters(kind=kind))
    trained = config.adapter.num_params(config.model)
    rest, peak = simulation.resting_bytes, simulation.peak_bytes
    tensors = 2 * 7 * (3 if kind == "dora" else 2)
    assert rest["optimizer"] == 8 * trained + 4 * tensors
    assert rest["parameters"] == 2 * config.model.num_params + 4 * trained
    assert peak["gradients"] <= 4 * trained
    assert rest["gradients"] == 0


def test_weights_in_4_bits_are_simulated():
    wide, packed = (simulate(settings(adapters(base=base)), 1) for base in ("auto", "nf4"))
    assert packed.flops == wide.flops
    assert packed.resting_bytes["parameters"] < 0.7 * wide.resting_bytes["parameters"]
    assert packed.resting_bytes["activations"] < 2**12


def test_nothing_of_the_fake_ranks_is_left_behind():
    with pytest.raises(ConfigError, match="must divide the number of ranks"):
        simulate(settings({"parallel": {"tensor": 2}}), 7)
    simulate(settings(), 4)
    assert not dist.is_initialized()
    assert float(torch.ones(2).sum()) == 2


LARGE = """
import sys, time, torch
torch.set_num_threads(1)
from ternlm.config import load_config
from ternlm.monitor.memory import peak_memory
from ternlm.train.simulate import simulate
simulate(load_config(sys.argv[1], sys.argv[2:]), 1024)
print(time.process_time(), peak_memory(torch.device("cpu")))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "overrides", "seconds"),
    [
        ("recipes/internlm_7b.toml", ["sharding.optimizer=8"], 60),
        ("recipes/internlm_20b.toml", ["parallel.tensor=4", "parallel.pipeline=4"], 180),
    ],
)
def test_a_thousand_ranks_of_a_large_model_are_simulated_soon_and_in_little_memory(recipe, overrides, seconds):
    command = [sys.executable, "-c", LARGE, recipe, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Processor time of one thread: what passes on a machine that has nothing else to do.
    used, bytes_held = done.stdout.split()[-2:]
    assert float(used) < seconds
    assert int(bytes_held) < 2 * 2**30


def test_dynamic_rope_is_simulated():
    changes = {"model": {"rope_scaling": {"kind": "dynamic", "factor": 2.0}}, "parallel": {"context": 2}}
    assert simulate(settings(changes, sequences=4), 4).flops > 0
