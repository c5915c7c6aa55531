"""The report of memory that ran out: kinds beside their predictions, and changes that fit what is left."""

import pytest

from ternlm.config import config_from_dict, load_config, render
from ternlm.config.layout import resolve_layout
from ternlm.planner.known import find_cluster
from ternlm.planner.memory import GIB, peak_memory
from ternlm.planner.plan import make_plan
from ternlm.planner.shortage import Held, advise, exceeding, joined, report_elsewhere, report_shortage, warn_of_shortage


@pytest.fixture(scope="module")
def config():
    """A model of 2.5 B parameters on 4,096 tokens, in microbatches of 8."""
    model = dict(
        vocab_size=32000, hidden_size=2048, num_hidden_layers=48, num_attention_heads=16, intermediate_size=5504,
        max_position_embeddings=4096,
    )  # fmt: skip
    return config_from_dict(
        {
            "model": model,
            "data": {"seq_len": 4096, "sources": [{"name": "a", "path": "a"}]},
            "batch": {"global_sequences": 64, "microbatch_sequences": 8},
            "train": {"steps": 10},
            "compute": {"dtype": "bfloat16"},
        }
    )


H100 = find_cluster("h100x8")


def report(config, **changes):
    layout = resolve_layout(config, 8)
    planned = joined(peak_memory(config, layout, H100))
    parts = {kind: changes.get(kind, size) for kind, size in planned.items()}
    held = Held(parts, changes.get("asked", 0.0), 80 * GIB, changes.get("before", 0.0))
    return report_shortage(config, layout, held, H100, "rank 3 in step 7").splitlines()


def test_the_kind_that_exceeded_its_prediction_is_named(config):
    lines = report(config, optimizer=60 * GIB, asked=2 * GIB)
    assert lines[0] == "memory ran out on rank 3 in step 7; it has 80 GiB and asked for 2 GiB more"
    (row,) = (line for line in lines if line.endswith("optimizer states"))
    assert row.split()[:2] == ["60", "GiB"]
    assert "above its prediction: optimizer" in lines


def test_what_it_asked_for_counts_with_the_activations(config):
    assert "above its prediction: activations" in report(config, asked=30 * GIB)


def test_what_others_held_at_the_start_isnt_a_fault_of_the_prediction(config):
    lines = report(config, reserve=50 * GIB, before=50 * GIB)
    assert not any(line.startswith("above") for line in lines)
    lines = report(config, reserve=50 * GIB, before=5 * GIB)
    (verdict,) = [line for line in lines if line.startswith("above")]
    assert verdict.startswith("above its prediction: what isn't tensors; other processes take it")


def test_several_kinds_come_the_worst_first():
    planned = {"weights": 10.0, "gradients": 10.0, "activations": 80.0}
    assert exceeding({"weights": 16.0, "gradients": 40.0, "activations": 84.0}, planned) == ["gradients", "weights"]


def test_a_run_that_was_never_to_fit_says_so(config):
    planned = sum(joined(peak_memory(config, resolve_layout(config, 8), H100)).values())
    assert planned > 80 * GIB
    assert any("no kind exceeded its prediction: the run needs" in line for line in report(config))


def test_changes_fit_the_fastest_first_and_are_what_the_planner_says(config, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(render(config))
    layout = resolve_layout(config, 8)
    lines = advise(config, layout, 80 * GIB, H100)
    assert lines[0] == "the cheapest changes that fit, the fastest first:"
    assert len(lines) == 4
    now, speeds = make_plan(config, H100, 8), []
    for line in lines[1:]:
        typed, said = line.split("  (")
        plan = make_plan(load_config(recipe, typed.split()), H100, 8)
        assert plan.memory.bytes <= 80 * GIB
        assert f"{plan.tokens_per_second / now.tokens_per_second - 1:+.0%} tokens/s" in said
        speeds.append(plan.tokens_per_second)
    assert speeds == sorted(speeds, reverse=True)


def test_an_overrun_is_taken_off_what_changes_may_use(config):
    small = config.model_copy(update={"batch": config.batch.model_copy(update={"microbatch_sequences": 4})})
    layout = resolve_layout(small, 8)
    memory = peak_memory(small, layout, H100)
    held = Held({**joined(memory), "activations": 75 * GIB}, 4 * GIB, 80 * GIB)
    text = report_shortage(small, layout, held, H100, "rank 0")
    overrun = sum(held.parts.values()) + held.asked - memory.bytes
    assert text.splitlines()[-3:] == advise(small, layout, 80 * GIB - overrun, H100)[-3:]


def test_a_device_that_nothing_is_known_of_still_gets_advice(config):
    layout = resolve_layout(config, 8)
    lines = advise(config, layout, 80 * GIB, None)
    assert "ranked at the rates of a100x8" in lines[0]
    assert "tern calibrate" in lines[0]
    assert len(lines) == 4


def test_where_nothing_fits_it_says_what_to_try(config):
    (line,) = advise(config, resolve_layout(config, 8), 1 * GIB, H100)
    assert "no single change makes it fit" in line
    assert "--search" in line


def test_a_run_that_wont_fit_is_told_before_it_starts(config):
    layout = resolve_layout(config, 8)
    need = peak_memory(config, layout, H100).bytes
    assert warn_of_shortage(config, layout, Held({}, 0.0, need), H100) is None
    assert warn_of_shortage(config, layout, Held({}, 0.0, need, before=1.5 * GIB), H100) is None  # it is in the reserve
    assert warn_of_shortage(config, layout, Held({}, 0.0, need, before=60 * GIB), H100)
    said = warn_of_shortage(config, layout, Held({}, 0.0, 80 * GIB), H100)
    assert said is not None
    assert "is predicted to need" in said
    assert "activations" in said
    assert "the cheapest changes that fit" in said


def test_no_change_that_needs_as_much_is_advised(config):
    """Where memory was taken by others, a run that was predicted to fit must shrink, not grow."""
    small = config.model_copy(update={"batch": config.batch.model_copy(update={"microbatch_sequences": 1})})
    layout = resolve_layout(small, 8)
    memory = peak_memory(small, layout, H100)
    held = Held({**joined(memory), "reserve": 60 * GIB}, 1 * GIB, 80 * GIB, before=1 * GIB)
    lines = report_shortage(small, layout, held, H100, "rank 0").splitlines()
    changes = [line for line in lines if "predicted, " in line]
    assert all("sharding.params=1" not in line for line in changes)
    for line in changes:
        size = line.split("(")[1].split(" predicted")[0]
        number, unit = size.split()
        assert float(number) * {"GiB": 1, "MiB": 1 / 1024}[unit] < memory.bytes / GIB


def test_outside_a_step_nothing_is_held_against_a_prediction():
    text = report_elsewhere(
        Held({"weights": GIB, "activations": 3 * GIB}, GIB, 8 * GIB), "rank 1 in validation after step 4"
    )
    assert text.startswith("memory ran out on rank 1 in validation after step 4; it has 8 GiB and asked for 1 GiB more")
    assert "copies for a save" in text
    assert "prediction:" not in text
