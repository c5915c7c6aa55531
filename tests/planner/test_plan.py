"""A plan adds up; a search finds what trying everything finds; what isn't legal or doesn't fit gets a way out."""

import json
from dataclasses import replace
from itertools import islice

import pytest
from planned_runs import internlm
from small_runs import settings

from ternlm.config import config_from_dict, config_to_dict, load_config, render
from ternlm.config.layout import resolve_layout
from ternlm.config.section import ConfigError
from ternlm.planner.advice import cheapest_changes, nearest_legal, plan_or_advise
from ternlm.planner.auto import take_best
from ternlm.planner.bounds import MeshBound
from ternlm.planner.choice import Choice, choice_of, meshes, recomputes, shardings
from ternlm.planner.explain import explain_memory, explain_time, whole_step
from ternlm.planner.flops import training_flops_per_token
from ternlm.planner.job import Request, run_plan
from ternlm.planner.known import find_cluster
from ternlm.planner.length import run_length
from ternlm.planner.plan import make_plan
from ternlm.planner.scale import doublings, scale
from ternlm.planner.search import Search

H100 = find_cluster("h100x8")
A800 = find_cluster("a800x8@100")


def small(**changes):
    """Settings of a model of which no test trains some combinations."""
    return settings({**changes, "parallel": {"allow_untested": True, **changes.get("parallel", {})}})


def tight(gib):
    """An A800 with less memory, so that some layouts don't fit."""
    return A800.model_copy(update={"memory_gib": gib, "reserve_gib": 0.0})


def everything(config, cluster, world):
    """Return the fastest that fits of each mesh, by trying all of them."""
    fastest = {}
    for mesh in meshes(config, world, cluster.devices_per_node):
        for recomputed in recomputes(mesh):
            for choice in shardings(recomputed, world):
                try:
                    plan = make_plan(choice.checked_in(config), cluster, world)
                except ConfigError:
                    continue
                if plan.fits:
                    best = fastest.get(mesh)
                    fastest[mesh] = min(best or plan.time.seconds, plan.time.seconds)
    return sorted(fastest.values())


def test_a_plan_is_the_sum_of_what_it_explains():
    plan = make_plan(internlm(64, {"grads": 8, "optimizer": 8}, parallel={"tensor": 2}), H100, 64)
    assert sum(part.amount for part in explain_time(plan)) == pytest.approx(plan.time.seconds)
    assert sum(part.amount for part in explain_memory(plan)) == pytest.approx(plan.memory.bytes)
    assert sum(plan.bounds.values()) == pytest.approx(plan.time.seconds)
    assert all(part.how for part in [*explain_time(plan), *explain_memory(plan)])
    per_token = training_flops_per_token(plan.config.model, 2048)
    assert plan.tflops.full == pytest.approx(per_token.full * plan.tokens_per_second / 1e12)
    # Its share of what is counted as causal, but that attention's backward makes the scores anew.
    kernels = whole_step(plan)
    assert kernels.flops - kernels.attention_flops / 2 == pytest.approx(plan.flops.causal)
    assert run_length(plan, plan.step_tokens).seconds == pytest.approx(plan.time.seconds)


@pytest.mark.parametrize(("world", "gib"), [(4, 80.0), (4, 0.25), (6, 0.3)])
def test_a_search_finds_what_trying_everything_finds(world, gib):
    config, cluster = small(batch={"global_sequences": 24}), tight(gib)
    found = Search(config, cluster, world).run(10)
    expected = everything(config, cluster, world)
    assert len(expected) >= 10
    assert [plan.time.seconds for _, plan in found.best] == pytest.approx(expected[:10])
    for choice, plan in found.best:
        again = make_plan(choice.checked_in(config), cluster, world)
        assert again.fits
        assert again.time.seconds == pytest.approx(plan.time.seconds)


def test_bounds_are_below_the_plans_and_near():
    config = internlm(64)
    mesh = Choice(tensor=2, pipeline=2, microbatch_sequences=2)
    bound = MeshBound(config, mesh, A800, 64, 2048)
    for cut in shardings(mesh, 64):
        seconds = make_plan(cut.in_config(config), A800, 64, layout=cut.layout(64)).time.seconds
        assert bound.seconds(cut.layout(64)) <= seconds * (1 + 1e-9)
        assert bound.seconds(cut.layout(64)) > 0.97 * seconds


@pytest.mark.slow
def test_a_search_for_1024_devices_takes_seconds_and_says_what_it_left_out():
    config = internlm(1024)
    found = Search(config, find_cluster("h100x8"), 1024).run(3)
    assert found.examined < 2_000
    assert found.slower > 100
    assert any("zero_bubble" in message for message in found.illegal)


def test_the_first_of_a_search_is_no_slower_than_the_recipes():
    config = load_config("internlm_7b")
    first = Search(config, A800, 16).run(1).best[0][1]
    assert first.time.seconds <= make_plan(config, A800, 16).time.seconds


def test_what_fits_nowhere_is_refused_with_the_least_it_needs():
    with pytest.raises(ConfigError, match=r"no layout of 2 devices of 0\.01 GiB fits: the least is .* GiB"):
        Search(small(), tight(0.01), 2).run()


@pytest.mark.parametrize(
    ("changes", "world", "nearest"),
    [
        ({"parallel": {"tensor": 3}}, 8, "nearest legal: parallel.tensor="),
        ({"sharding": {"grads": 3, "optimizer": 6}}, 8, "sharding.grads=4 sharding.optimizer=8"),
        (
            {"batch": {"microbatch_sequences": 3, "global_sequences": 48}, "sharding": {"grads": 7}},
            8,
            "sharding.grads=8",
        ),
        ({"parallel": {"pipeline": 3}}, 8, "nearest legal: parallel.pipeline=4"),
    ],
)
def test_a_layout_that_is_not_legal_names_the_nearest_that_is(changes, world, nearest):
    with pytest.raises(ConfigError, match=r"must .*\nnearest legal: .*") as caught:
        plan_or_advise(small(**changes), H100, world)
    assert nearest in str(caught.value)
    assert "microbatch" not in str(caught.value).partition("nearest")[2]  # what is legal stays
    choice = nearest_legal(small(**changes), world, 8)
    assert choice
    resolve_layout(choice.checked_in(small(**changes)), world)


def test_what_does_not_fit_gets_changes_that_do_the_fastest_first():
    config = load_config("internlm_20b", ["parallel.tensor=1"])
    assert not make_plan(config, H100, 64).fits
    changes = cheapest_changes(config, H100, 64)
    assert len(changes) == 3
    times = [plan.time.seconds for _, plan in changes]
    assert times == sorted(times)
    for choice, plan in changes:
        assert plan.fits
        changed = replace(choice_of(config), params=1, grads=8, optimizer=8)
        assert choice.overrides(changed)


def test_auto_takes_the_best_for_the_device_and_may_be_saved():
    config = config_from_dict({**config_to_dict(internlm(16)), "parallel": "auto"})
    with pytest.raises(ConfigError, match="leaves the layout to the planner"):
        resolve_layout(config, 16)
    chosen = take_best(config, 16, "NVIDIA H100 80GB HBM3", 8)
    assert not chosen.parallel.auto
    layout = resolve_layout(chosen, 16)
    careful = H100.model_copy(update={"memory_gib": 0.92 * 80})
    best = Search(config, careful, 16).run(1).best[0][1]
    assert make_plan(chosen, H100, 16, layout=layout).time.seconds == pytest.approx(best.time.seconds)
    assert config_from_dict(config_to_dict(chosen)) == chosen
    assert take_best(chosen, 16) is chosen


def test_auto_refuses_unknown_devices_and_replaces_degrees():
    config = config_from_dict({**config_to_dict(internlm(8)), "parallel": {"auto": True}})
    with pytest.raises(ConfigError, match=r"doesn't know the device 'cpu'; set parallel\.cluster"):
        take_best(config, 8, "cpu")
    twenty = load_config("internlm_20b", ["parallel.auto=true"])  # whose tensor is 4
    assert resolve_layout(take_best(twenty, 64, "NVIDIA H100 80GB HBM3"), 64)


def test_scaling_names_what_has_no_plan_and_grows_the_batch():
    config = internlm(8, {"optimizer": 8}, rows=1, accumulation=1)
    points = scale(config, A800, doublings(8, 32))
    assert [point.world for point in points] == [8, 16, 32]
    assert points[0].plan
    assert points[1].plan is None
    assert "global_sequences" in points[1].note
    grown = scale(config, A800, doublings(8, 32), sequences_per_device=1.0)
    rates = [point.plan.tokens_per_second for point in grown if point.plan]
    assert len(rates) == 3
    assert rates == sorted(rates, reverse=True)


def test_documents_shorten_attention_and_must_be_possible():
    config = internlm(8)
    whole, short = make_plan(config, H100, 8), make_plan(config, H100, 8, document_tokens=256)
    assert short.time.parts["attention"] < whole.time.parts["attention"]
    assert short.time.parts["matmul"] == whole.time.parts["matmul"]
    with pytest.raises(ConfigError, match=r"documents of 4096 tokens must have 1 to data\.seq_len = 2048"):
        make_plan(config, H100, 8, document_tokens=4096)


def test_rates_of_one_number_format_are_not_taken_for_another():
    slow = H100.model_copy(update={"dtype": "float32"})
    with pytest.raises(
        ConfigError, match=r"compute\.dtype = 'bfloat16' can't be planned for .* calibrate --dtype bfloat16"
    ):
        make_plan(internlm(8), slow, 8)
    with pytest.raises(ConfigError, match=r"set compute\.dtype=bfloat16"):
        Search(internlm(8, compute={"dtype": "float32"}), H100, 8)
    auto = internlm(8, compute={"dtype": "auto"})
    assert make_plan(auto, H100, 8).memory == make_plan(internlm(8, compute={"dtype": "bfloat16"}), H100, 8).memory
    assert make_plan(auto, slow, 8).memory == make_plan(internlm(8, compute={"dtype": "float32"}), slow, 8).memory


def test_every_choice_can_be_typed(tmp_path):
    config = internlm(32)
    recipe = tmp_path / "run.toml"
    recipe.write_text(render(config))
    for mesh in islice(meshes(config, 32, 8), 0, None, 17):
        choice = replace(mesh, recompute=0.5, recompute_keep="matmuls", optimizer=4)
        typed = load_config(recipe, choice.overrides(choice_of(config)))
        assert choice_of(typed) == choice


def test_a_checkpoints_facts_alone_tell_how_it_goes_on(tmp_path, capsys):
    folder, out = tmp_path / "step-00000004", tmp_path / "figures.json"
    folder.mkdir()
    (folder / "config.toml").write_text(render(internlm(8)))
    (folder / "state.json").write_text(json.dumps({"progress": {"step": 4, "tokens": 524288}}))
    run_plan(Request((), "a800x8", devices=12, top=2, json=out), folder)
    said = capsys.readouterr().out
    assert "After 4 of 10 steps" in said
    assert "The global batch stays 64 sequences" in said
    assert "12 devices can't each take as many" in said
    best = json.loads(out.read_text())["best"]
    assert len(best) == 2
    assert best[0]["choice"]["tensor"] * best[0]["choice"]["pipeline"] % 3 == 0  # 64 isn't a multiple of 3
    (folder / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"state\.json can't be read"):
        run_plan(Request((), "a800x8"), folder)


def test_requests_that_mean_nothing_are_refused(tmp_path):
    for request, said in (
        (Request(()), "give a RECIPE"),
        (Request(("debug",), plot=tmp_path / "a.png"), "is of the table of --scale"),
        (Request(("debug",), scale_to=8, plot=tmp_path / "a.gif"), "must end in .png"),
        (Request(("debug",), scale_to=8, json=tmp_path / "no/a.json"), "must lie in a folder that exists"),
        (Request(("debug",), scale_to=4), "at least a node's 8 devices"),
        (Request(("debug",), "h10x8"), "did you mean h100x8"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_plan(request)


def test_what_isnt_counted_is_said(capsys):
    run_plan(Request(("internlm_7b",), nodes=2))
    assert "Muon" not in capsys.readouterr().out
    run_plan(Request(("internlm_7b", "optimizer.kind=muon"), nodes=2))
    assert "Muon is counted as AdamW" in capsys.readouterr().out


def test_a_plan_says_that_it_does_not_fit_and_what_would(capsys):
    run_plan(Request(("internlm_20b", "parallel.tensor=1"), nodes=8))
    said = capsys.readouterr().out
    assert "Does NOT fit" in said
    assert "What makes it fit" in said
    assert f"of {H100.memory_gib:g} GiB" in said


def test_a_plot_is_drawn(tmp_path):
    file = tmp_path / "scale.png"
    run_plan(Request(("internlm_7b",), "a800x8", scale_to=64, plot=file))
    assert file.read_bytes().startswith(b"\x89PNG")
