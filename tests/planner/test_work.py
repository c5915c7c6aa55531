"""Operations, bytes and parameters that the planner counts, against closed forms, the model and the simulation."""

import pytest
import torch
from planned_runs import counted_flops
from small_runs import adapters, settings

from ternlm.config.layout import Layout, resolve_layout
from ternlm.config.model import PRESETS, ModelConfig
from ternlm.model.decoder import build_model
from ternlm.planner.flops import forward_flops, matmul_params, training_flops
from ternlm.planner.memory import peak_memory
from ternlm.planner.step_traffic import parameters
from ternlm.planner.work import Program, step_work
from ternlm.train.simulate import simulate

FEW = {"batch": {"global_sequences": 2}}
RECOMPUTED = {"compute": {"recompute": 1.0}}
LAYOUTS = {
    "one rank": (1, {}),
    "one rank, recomputed": (1, {"compute": {"recompute": 1.0}}),
    "one rank, attention and activation recomputed": (1, {"compute": {"recompute": 1.0, "recompute_keep": "matmuls"}}),
    "zero1": (8, {}),
    "zero3, half recomputed": (8, {"sharding": {"params": -1, "grads": -1}, "compute": {"recompute": 0.5}}),
    "tensor, recomputed": (8, {"parallel": {"tensor": 2}, "compute": {"recompute": 1.0}}),
    "ring": (8, {"parallel": {"context": 2}}),
    "heads exchanged": (8, {"parallel": {"context": 2, "context_method": "all_to_all"}}),
    "1f1b": (8, {"parallel": {"pipeline": 2}}),
    "1f1b, recomputed": (4, {"parallel": {"pipeline": 4}, "compute": {"recompute": 1.0}}),
    "interleaved": (8, {"parallel": {"pipeline": 2, "pipeline_schedule": "interleaved", "stages_per_rank": 2}}),
    "zero bubble": (8, {"parallel": {"pipeline": 2, "pipeline_schedule": "zero_bubble"}}),
    "adapters": (1, adapters(FEW)),
    "adapters, dora, recomputed": (1, adapters({**FEW, **RECOMPUTED}, kind="dora")),
    "adapters, recomputed, keeping products": (
        1,
        adapters({**FEW, "compute": {"recompute": 1.0, "recompute_keep": "matmuls"}}),
    ),
    "adapters, some matrices": (1, adapters(FEW, targets=["q_proj", "v_proj"])),
    "adapters, late matrices": (1, adapters(FEW, targets=["gate_proj", "down_proj"])),
    "adapters, float32 base": (1, adapters(FEW, base="float32")),
    "adapters, 4 bits": (1, adapters(FEW, base="nf4")),
    "adapters, 4 bits, recomputed": (1, adapters({**FEW, **RECOMPUTED}, base="nf4")),
    "adapters, zero1": (8, adapters()),
    "adapters, zero3, dora": (8, adapters({"sharding": {"params": -1, "grads": -1}}, kind="dora")),
    "adapters, zero3, 4 bits": (8, adapters({"sharding": {"params": -1, "grads": -1}}, base="nf4")),
    "adapters, tensor": (2, adapters({**FEW, "parallel": {"tensor": 2}})),
    "adapters, tensor, dora, recomputed": (
        8,
        adapters({"parallel": {"tensor": 2, "sequence": False}, **RECOMPUTED}, kind="dora"),
    ),
    "adapters, ring": (8, adapters({"parallel": {"context": 2}})),
    "adapters, 1f1b": (8, adapters({"parallel": {"pipeline": 2}})),
}
TOKENS = 256  # of the longest sequence that every preset has
QUICK = ("zero1", "tensor, recomputed", "1f1b", "adapters", "adapters, zero3, dora", "adapters, tensor")


def each_layout():
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]


def whole(preset, recompute=0.0):
    changes = {"data": {"seq_len": TOKENS}, "compute": {"recompute": recompute}}
    return settings(changes, 1, {"preset": preset})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_steps_products_are_those_of_the_published_conventions(preset):
    config = whole(preset)
    model, tokens = config.model, TOKENS
    work = step_work(config, Layout(1))
    layers = model.num_hidden_layers
    kernels = [work.forward, work.backward] * layers + [work.stages[0].ends_forward, work.stages[0].ends_backward]
    assert sum(m.flops for k in kernels for m in k.matmuls) == 6 * matmul_params(model) * tokens
    forward = forward_flops(model, tokens, tokens**2)
    attention = layers * work.forward.attention_flops
    assert attention == forward.full - forward.causal
    # Backward, attention's scores are made again: 5 products for 4.
    assert layers * work.backward.attention_backward_flops == 2.5 * attention
    convention = training_flops(model, tokens, tokens**2).causal
    assert counted_flops(config, Layout(1)) == convention + 0.5 * attention


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recomputed_block_runs_again_but_for_the_product_whose_result_nothing_needs(preset):
    config = whole(preset, recompute=1.0)
    model, tokens = config.model, TOKENS
    again = counted_flops(config, Layout(1)) - counted_flops(whole(preset), Layout(1))
    forward = training_flops(model, tokens, tokens**2, recompute=1.0)
    block = forward.hardware - forward.full  # with all of attention, of which a causal kernel computes half
    attention = model.num_hidden_layers * step_work(config, Layout(1)).forward.attention_flops
    down = 2 * model.num_hidden_layers * model.hidden_size * model.intermediate_size * tokens
    assert again == block - attention - down


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_and_bytes_are_those_of_the_model_on_meta_tensors(preset):
    config = ModelConfig(preset=preset)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_model(config).named_parameters()}
    planned = [p for unit in parameters(config) for p in unit]
    assert {p.name: p.shape for p in planned} == shapes
    held = peak_memory(whole(preset), Layout(1)).parts
    assert held["optimizer"] == 8 * sum(p.shape[0] * p.row for p in planned if len(p.shape) > 1) + _vectors(config)
    assert held["weights"] == held["optimizer"] / 2


def _vectors(config):
    return 8 * sum(p.shape[0] for unit in parameters(config) for p in unit if len(p.shape) == 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_each_presets_block_computes_what_the_simulated_step_does(preset):
    config = settings({"data": {"seq_len": TOKENS}}, 2, {"preset": preset, "num_hidden_layers": 2})
    assert simulate(config, 2).flops == counted_flops(config, resolve_layout(config, 2))


@pytest.mark.parametrize("name", each_layout())
def test_each_ranks_operations_and_memory_are_the_simulations(name):
    world, changes = LAYOUTS[name]
    config = settings(changes)
    layout = resolve_layout(config, world)
    peaks = []
    for stage in range(layout.pipeline):
        simulation = simulate(config, world, stage * layout.data_ranks * layout.tensor)
        assert simulation.flops == counted_flops(config, layout, stage)
        peaks.append(sum(simulation.peak_bytes.values()))
    memory = peak_memory(config, layout)
    assert memory.bytes == pytest.approx(max(peaks), rel=0.03)
    if len(peaks) > 1 and max(peaks) > 1.05 * min(peaks):
        assert memory.rank == peaks.index(max(peaks))


def test_stages_of_other_programs_have_equally_many_layers_and_those_left_over_come_last():
    config = settings({"parallel": {"pipeline": 4}}, model={"preset": "internlm-7b", "num_hidden_layers": 18})
    even = step_work(config, Layout(4, pipeline=4), Program(even_stages=True))
    assert [stage.blocks for stage in even.stages] == [4, 4, 5, 5]
    own = step_work(config, Layout(4, pipeline=4))
    assert own.stages[-1].blocks < even.stages[-1].blocks  # the head counts, too
    assert sum(stage.blocks for stage in own.stages) == 18
