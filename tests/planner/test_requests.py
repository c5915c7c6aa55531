"""What `tern plan` is asked: what means nothing is refused, what is printed can be typed, all of a run is counted."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from planned_runs import internlm
from small_runs import settings

from ternlm.config import config_from_dict, config_to_dict, load_config, render
from ternlm.config.section import ConfigError
from ternlm.planner import known
from ternlm.planner.auto import take_best
from ternlm.planner.choice import choice_of
from ternlm.planner.explain import explain_time
from ternlm.planner.job import Request, run_plan
from ternlm.planner.known import find_cluster, sheets, sheets_of
from ternlm.planner.length import run_length, stretches, tokens_from
from ternlm.planner.plan import make_plan
from ternlm.planner.scale import doublings, scale
from ternlm.planner.search import Search
from ternlm.planner.show import plan_tables
from ternlm.planner.show_search import search_figures

H100 = find_cluster("h100x8")
RAMP = {"rampup": {"start": 16, "increment": 16, "every": 3}}


@pytest.fixture
def recipe(tmp_path):
    """The path of InternLM-7B's recipe on 8 devices, with changes."""

    def write(**sections):
        table = config_to_dict(internlm(8))
        for name, values in sections.items():
            table[name] = {**table.get(name, {}), **values} if isinstance(values, dict) else values
        path = tmp_path / "run.toml"
        path.write_text(render(config_from_dict(table)))
        return str(path)

    return write


@pytest.fixture
def planned(tmp_path, capsys):
    """Ask, and return the figures and what was printed."""

    def ask(request, checkpoint=None):
        file = tmp_path / "figures.json"
        run_plan(replace(request, json=file), checkpoint)
        return json.loads(file.read_text()), " ".join(capsys.readouterr().out.split())

    return ask


def saved(folder, config, step=4):
    folder.mkdir()
    (folder / "config.toml").write_text(render(config))
    (folder / "state.json").write_text(json.dumps({"progress": {"step": step, "tokens": 524288}}))
    (folder / "COMPLETE").touch()
    return folder


def test_a_table_of_a_run_that_is_left_to_the_planner_has_the_best_layouts(recipe, planned):
    figures, said = planned(Request((recipe(parallel="auto"),), scale_to=16))
    searched, _ = planned(Request((recipe(),), scale_to=16, search=True))
    rates = [[point["step_seconds"] for point in one["points"]] for one in (figures, searched)]
    assert rates[0] == rates[1]
    assert "8: parallel.auto=false" in said


def test_a_table_without_a_row_is_refused_with_a_reason(recipe):
    with pytest.raises(
        ConfigError, match=r"no number of devices from 8 to 16 has a plan; of the last: .*tensor.* must"
    ):
        run_plan(Request((recipe(parallel={"tensor": 3}),), scale_to=16))


def test_a_batch_that_grows_is_counted_step_by_step():
    config = settings({"batch": RAMP}, sequences=64)
    assert list(stretches(config)) == [(16, 3), (32, 3), (48, 3), (64, 1)]
    assert list(stretches(config, 4)) == [(32, 2), (48, 3), (64, 1)]
    assert tokens_from(config) == sum(config.batch.sequences_at(step) for step in range(10)) * 512
    assert tokens_from(config, 10) == 0
    assert list(stretches(config, 0, 512 * (16 * 3 + 32 * 1.5))) == [(16, 3), (32, 1.5)]
    assert list(stretches(config, 9, 512 * 64 * 100.0)) == [(64, 100)]


def test_smaller_batches_take_their_own_time():
    plain, growing = settings(sequences=64), settings({"batch": RAMP}, sequences=64)
    plan = make_plan(growing, H100, 8)
    length = run_length(plan, tokens_from(growing))
    times = [make_plan(settings(sequences=n), H100, 8).time.seconds for n in (16, 32, 48)]
    assert length.seconds == pytest.approx(3 * sum(times) + plan.time.seconds)
    assert (length.steps, length.growing_steps) == (10, 9)
    same = run_length(make_plan(plain, H100, 8), length.tokens)
    assert same.steps < 10
    assert same.seconds < length.seconds  # small steps are less efficient
    assert length.device_hours == pytest.approx(8 * length.seconds / 3600)
    assert length.dollars is None


def test_a_batch_that_grows_with_the_devices_does_at_both_ends():
    points = scale(settings({"batch": RAMP}, sequences=64), H100, doublings(8, 16), sequences_per_device=8.0)
    assert points[1].note == "batch.global_sequences=128 batch.rampup.start=32 batch.rampup.increment=32"
    assert points[1].plan.config.batch.rampup.increment == 32
    assert points[0].note == "batch.global_sequences=64 batch.rampup.start=16 batch.rampup.increment=16"


def test_the_recipes_cluster_is_taken_where_no_other_is_named(recipe, planned):
    path = recipe(parallel={"cluster": "a800x4"})
    assert planned(Request((path,), nodes=2))[0]["cluster"] == "a800x4"
    assert planned(Request((path,), "h100x8"))[0]["cluster"] == "h100x8"
    assert planned(Request((recipe(),)))[0]["cluster"] == "h100x8"


def test_figures_have_the_runs_length_cost_and_size(recipe, planned):
    figures, _ = planned(Request((recipe(),), devices=12, tokens=1e9, dollars_per_hour=2.0, search=True))
    assert (figures["devices"], figures["nodes"]) == (12, 2)
    run = figures["best"][0]["run"]
    assert run["tokens"] == 1e9
    assert run["dollars"] == pytest.approx(2 * run["device_hours"])
    figures, _ = planned(Request((recipe(),), nodes=1))
    assert (figures["devices"], figures["nodes"], figures["run"]["dollars"]) == (8, 1, None)
    assert figures["run"]["seconds"] == pytest.approx(10 * figures["step_seconds"])
    assert figures["run"]["steps"] == pytest.approx(10)
    figures, _ = planned(Request((recipe(),), scale_to=16))
    assert [point["nodes"] for point in figures["points"]] == [1, 2]
    assert all(point["run"]["device_hours"] for point in figures["points"])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"nodes": 2, "devices": 16}, r"--nodes = 2 has no effect beside --devices = 16.*leave one of them out"),
        ({"top": 3}, "--top = 3 has no effect without --search; add --search"),
        ({"top": 3, "search": True, "scale_to": 16}, "--top = 3 has no effect with --scale.*leave it out"),
        ({"tokens": float("inf")}, "--tokens = inf must be a finite number of at least 1; give"),
        ({"tokens": float("nan")}, "--tokens = nan must"),
        ({"dollars_per_hour": float("inf")}, "--dollars-per-hour = inf must be a finite number of at least 0; give"),
        ({"dollars_per_hour": float("nan")}, "--dollars-per-hour = nan must"),
        ({"dollars_per_hour": -1.0}, "--dollars-per-hour = -1 must"),
    ],
)
def test_options_that_mean_nothing_are_refused(recipe, asked, told):
    with pytest.raises(ConfigError, match=told):
        run_plan(Request((recipe(),), **asked))


def test_the_number_of_layouts_to_show_may_be_given_wherever_they_are_searched(recipe, planned):
    assert len(planned(Request((recipe(parallel="auto"),), top=2))[0]["best"]) == 2


def test_a_table_of_what_is_left_of_a_run_says_how_far_it_is(tmp_path, planned):
    folder = saved(tmp_path / "step-00000004", internlm(8))
    figures, said = planned(Request((), scale_to=16), folder)
    assert "After 4 of 10 steps" in said
    assert "stays 64 sequences" in said
    assert "sequences a device" not in said
    left = 6 * 64 * 2048
    assert figures["done"] == {"step": 4, "steps": 10, "tokens": 524288, "tokens_left": left}
    assert [point["run"]["tokens"] for point in figures["points"]] == [left, left]
    figures, said = planned(Request(("train.steps=4",), scale_to=16), folder)
    assert figures["complete"]
    assert figures["done"]["tokens_left"] == 0
    assert "is complete; to go on, raise train.steps" in said


def test_a_batch_that_still_grows_is_said_to(tmp_path, planned):
    growing = config_from_dict({**config_to_dict(internlm(8)), "batch": {"global_sequences": 64, **RAMP}})
    figures, said = planned(Request(()), saved(tmp_path / "step-00000004", growing))
    assert "The global batch goes on to grow, from 32 to 64 sequences" in said
    assert figures["done"]["tokens_left"] == (2 * 32 + 3 * 48 + 64) * 2048
    assert figures["best"][0]["run"]["growing_steps"] == 5
    assert "with 5 steps of smaller batches" in said


def test_going_on_is_planned_without_torch(tmp_path):
    folder = saved(tmp_path / "step-00000004", internlm(8))
    code = (
        f"import sys; sys.argv = ['tern', 'plan', '--what-if', {str(folder)!r}, '--top', '1']\n"
        "from ternlm.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "After 4 of 10 steps" in done.stdout
    assert done.stderr.split()[-1] == "False"


def test_what_a_table_of_growing_batches_chose_can_be_typed(recipe, planned):
    path = recipe(parallel="auto")
    figures, _ = planned(Request((path,), scale_to=32, grow_batch=True))
    for point in figures["points"]:
        assert f"batch.global_sequences={8 * point['devices']}" in point["note"]
        again, _ = planned(Request((path, *point["note"].split()), devices=point["devices"]))
        assert again["step_seconds"] == pytest.approx(point["step_seconds"])


def test_a_size_of_all_ranks_is_not_typed_where_the_recipe_has_it(recipe):
    config = load_config(recipe(sharding={"optimizer": -1}))
    before = choice_of(config)
    assert before.optimizer == -1
    for choice, plan in Search(config, H100, 16).run(10).best:
        typed = choice.overrides(before, 16)
        whole = choice.optimizer == 16 // choice.pipeline // choice.tensor
        assert any("sharding.optimizer=" in one for one in typed) is not whole
        assert make_plan(load_config(recipe(), typed), H100, 16).time.seconds == plan.time.seconds


def test_what_to_type_under_auto_is_the_same_in_figures_and_in_print(recipe, planned):
    figures, said = planned(Request((recipe(parallel="auto"),), top=1))
    assert figures["best"][0]["overrides"][0] == "parallel.auto=false"
    assert f"To take it, add: {' '.join(figures['best'][0]['overrides'])}" in said
    config = load_config(recipe(parallel="auto"))
    assert "parallel.auto=true" not in str(search_figures(Search(config, H100, 8).run(1), config, 1e9))


def test_devices_of_one_name_are_told_apart_by_memory_else_full_power_is_taken(monkeypatch, caplog):
    caplog.set_level("INFO")
    assert sheets_of("NVIDIA H100 96GB") == ["h100-96", "h100-96-500w"]
    assert sheets_of("cpu") == []
    auto = config_from_dict({**config_to_dict(internlm(8)), "parallel": "auto"})
    take_best(auto, 8, "NVIDIA H100 96GB", 8, 94.5)
    assert "may be h100-96x8 or h100-96-500wx8; taken for one of full power, h100-96x8" in caplog.text
    assert "set parallel.cluster=h100-96-500wx8" in caplog.text
    assert "tokens/s a device predicted on h100-96x8" in caplog.text
    caplog.clear()
    take_best(auto, 8, "NVIDIA H200", 8, 140.0)
    assert "may be" not in caplog.text
    small = sheets()["h200"].model_copy(update={"memory_gib": 70.0})
    monkeypatch.setattr(known, "sheets", lambda: {**sheets(), "h200-70": small})
    assert sheets_of("NVIDIA H200", 139.8) == ["h200"]
    assert sheets_of("NVIDIA H200", 69.1) == ["h200-70"]


def test_a_plan_within_the_planners_error_of_the_limit_is_warned_of(recipe, planned):
    need = make_plan(load_config(recipe()), H100, 8).memory.bytes / 2**30
    for limit, fits, barely in ((need * 1.05, True, True), (need * 1.2, True, False), (need * 0.99, False, False)):
        plan = make_plan(load_config(recipe()), H100, 8)
        plan = replace(plan, cluster=H100.model_copy(update={"memory_gib": limit}))
        assert (plan.fits, plan.fits_barely) == (fits, barely)
        said = str(plan_tables(plan, run_length(plan, 1e9)).renderables)
        assert ("but within the planner's error of 8% of the limit" in said) is barely
    _, said = planned(Request(("internlm_20b",), nodes=32, top=1, search=True))
    assert "Its memory is within the planner's error of 8% of the limit" in said


def test_a_part_of_a_step_that_nothing_is_known_of_is_explained_as_well(recipe):
    plan = make_plan(load_config(recipe()), H100, 8)
    plan = replace(plan, time=replace(plan.time, parts={**plan.time.parts, "new": 1.0}))
    assert explain_time(plan)[-1].how == "by no single rate"
