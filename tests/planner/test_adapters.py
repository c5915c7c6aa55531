"""Plans of runs that train adapters beside frozen weights: what fits where, and what is said of it."""

import pytest
import torch
from planned_runs import internlm
from rich.console import Console
from small_runs import adapters, settings

from ternlm.config.layout import Layout
from ternlm.model.decoder import build_empty_model
from ternlm.model.linear import adapt, adapted
from ternlm.planner.bounds import MeshBound
from ternlm.planner.choice import Choice, shardings
from ternlm.planner.explain import explain_memory, explain_time
from ternlm.planner.known import find_cluster, sheets
from ternlm.planner.length import run_length
from ternlm.planner.memory import peak_memory
from ternlm.planner.plan import make_plan
from ternlm.planner.show import plan_figures, plan_tables
from ternlm.train.distributed import frozen_dtype

SMALL = [name for name, sheet in sheets().items() if sheet.memory_gib == 24]
RECOMPUTED = {"dtype": "bfloat16", "recompute": 1.0}


def seven_billion(**adapter):
    """InternLM-7B on one device: sequences of 2048 tokens, one a microbatch."""
    changes = adapters({"compute": RECOMPUTED}, **{"rank": 16, **adapter}) if adapter else {"compute": RECOMPUTED}
    return internlm(1, rows=1, accumulation=16, **changes)


@pytest.mark.parametrize("device", SMALL)
def test_adapters_of_a_7b_model_fit_one_card_of_24_gb_and_all_its_weights_do_not(device):
    cluster = find_cluster(f"{device}x1")
    wide, packed = (make_plan(seven_billion(base=base), cluster, 1) for base in ("auto", "nf4"))
    whole = make_plan(seven_billion(), cluster, 1)
    assert wide.fits
    assert packed.fits
    assert not whole.fits
    assert [plan.fits_barely for plan in (wide, packed)] == [False, False]
    assert packed.memory.bytes < 10 * 2**30 < wide.memory.bytes < 19 * 2**30


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_the_weights_take_what_a_built_model_holds(kind, targets, base):
    config = settings(adapters(kind=kind, targets=targets, base=base))
    adapter = config.adapter
    model = build_empty_model(
        config.model, torch.device("cpu"), lambda empty: adapt(empty, adapter, frozen_dtype(adapter, torch.bfloat16))
    )
    held = sum(parameter.nbytes for parameter in model.parameters())
    held += sum(linear.packed.num_bytes for linear in adapted(model).values() if linear.packed)
    memory = peak_memory(config, Layout(1))
    assert memory.parts["weights"] == held
    assert memory.trained == adapter.num_params(config.model)
    assert memory.parts["optimizer"] == 8 * memory.trained


def test_a_plan_says_what_is_trained_and_how_the_rest_is_kept():
    plan = make_plan(seven_billion(base="nf4"), find_cluster("rtx3090x1"), 1)
    length = run_length(plan, plan.step_tokens)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan_tables(plan, length))
    said = capture.get()
    assert "Adapters (lora, rank 16) are trained, 40 M parameters, 0.55% of the model's number" in said
    assert "4.5 bits for each of 6.48 B frozen weights" in said
    assert plan_figures(plan, length)["trained_parameters"] == plan.config.adapter.num_params(plan.config.model)
    assert sum(part.amount for part in explain_time(plan)) == pytest.approx(plan.time.seconds)
    assert sum(part.amount for part in explain_memory(plan)) == pytest.approx(plan.memory.bytes)


def test_a_step_of_adapters_is_sooner_done_than_one_of_all_weights():
    cluster = find_cluster("a100x1")
    adapted, whole = (make_plan(config, cluster, 1).time for config in (seven_billion(rank=16), seven_billion()))
    # Recomputed, three products for each matrix instead of four; the adapters' own are small, and slow for their size.
    assert 0.75 < adapted.seconds / whole.seconds < 0.95
    assert adapted.parts["optimizer"] < 0.01 * whole.parts["optimizer"]


@pytest.mark.parametrize("base", ["auto", "nf4"])
def test_no_way_to_cut_states_beats_the_bound_of_its_mesh(base):
    config = internlm(64, **adapters(kind="dora", base=base))
    cluster, mesh = find_cluster("a800x8@100"), Choice(tensor=2, pipeline=2, microbatch_sequences=2)
    bound = MeshBound(config, mesh, cluster, 64, 2048)
    for cut in shardings(mesh, 64):
        seconds = make_plan(cut.in_config(config), cluster, 64, layout=cut.layout(64)).time.seconds
        assert bound.floor() <= bound.seconds(cut.layout(64)) <= seconds * (1 + 1e-9)
        assert bound.seconds(cut.layout(64)) > 0.97 * seconds
