"""Reading recipes, overrides, and what a reader is told when something is wrong."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternlm.config import (
    Config,
    ConfigError,
    config_from_dict,
    config_to_dict,
    list_recipes,
    load_config,
    load_sft_config,
)

RECIPE = """
out = "small"
[model]
preset = "tiny"
[data]
seq_len = 64
sources = [{ name = "en", path = "data/en", weight = 1 }, { name = "code", path = "data/code", weight = 3.5 }]
[batch]
global_sequences = 8
[train]
steps = 10
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def wrong(recipe: Path, *overrides: str) -> str:
    """Return what the user is told."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    return str(caught.value)


def test_a_recipe_fills_in_preset_and_defaults(recipe: Path) -> None:
    config = load_config(recipe)
    assert (config.out, config.model.hidden_size, config.optimizer.betas) == ("small", 64, (0.9, 0.95))
    assert config.data.sources[1].weight == 3.5


def test_a_recipe_overrides_its_preset(recipe: Path) -> None:
    assert load_config(recipe, ["model.num_hidden_layers=7"]).model.num_hidden_layers == 7


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("train.steps=20", "train.steps", 20),
        ("train.steps=1_000", "train.steps", 1000),
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("optimizer.decay_all=true", "optimizer.decay_all", True),
        ("out=bigger run", "out", "bigger run"),
        ('out="5"', "out", "5"),
        ("out=a=b", "out", "a=b"),
        ("out=5\nseed = 3", "out", "5\nseed = 3"),
        ("model.rope_scaling.kind=linear", "model.rope_scaling.kind", "linear"),
        ("batch.rampup={start=2, increment=2, every=5}", "batch.rampup.every", 5),
        ("load.from=runs/x", "load.checkpoint", "runs/x"),
        ("data.sources.0.weight=2", "data.sources.0.weight", 2.0),
        ("data.sources.2={name='cn', path='data/cn', weight=1}", "data.sources.2.name", "cn"),
    ],
)
def test_an_override_reaches_its_field(recipe: Path, override: str, place: str, value: Any) -> None:
    found: Any = load_config(recipe, [override])
    for part in place.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_overrides_leave_the_rest_alone(recipe: Path) -> None:
    rampup = ["batch.rampup.start=4", "batch.rampup.increment=4", "batch.rampup.every=3"]
    before, after = load_config(recipe), load_config(recipe, ["data.sources.1.weight=2", *rampup])
    assert after.data.sources[0] == before.data.sources[0]
    assert after.data.sources[1].path == "data/code"
    assert after.batch.global_sequences == before.batch.global_sequences
    assert [after.batch.sequences_at(step) for step in (0, 2, 3, 100)] == [4, 4, 8, 8]


def test_the_last_override_wins(recipe: Path) -> None:
    assert load_config(recipe, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps", "must look like section.field=value"),
        ("train..steps=3", "must look like section.field=value"),
        ("seed=1", None),
        ("out.first=x", "there is no first in a value, 'small'"),
        ("data.sources.9.weight=2", "there is no 9 in a list of 2; give a number from 0, or 2 to append"),
        ("data.sources.en.weight=2", "there is no en in a list of 2"),
        ("optimizer.betas=[0.9,", "not TOML"),
    ],
)
def test_an_override_that_cannot_be_applied_is_named(recipe: Path, override: str, told: str | None) -> None:
    if told is None:
        load_config(recipe, [override])
    else:
        message = wrong(recipe, override)
        assert told in message
        assert override in message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "train.steps=0",
            "train.steps = 0 must be greater than 0 (optimizer steps of the whole run [steps])",
        ),
        ("train.steps=2.0", "train.steps = 2.0 must be a whole number"),
        ("train.steps=true", "train.steps = true must be a whole number"),
        ("optimizer.lr=fast", 'optimizer.lr = "fast" must be a number'),
        ("optimizer.lr=nan", "optimizer.lr = NaN must be a finite number"),
        ("optimizer.lr=inf", "optimizer.lr = Infinity must be a finite number"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1 = 1.0 must be less than 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1 is missing"),
        ("out=5", "out = 5 must be text in quotes"),
        ("optimizer.decay_all=1", "optimizer.decay_all = 1 must be true or false"),
        ("model=7", "model = 7 must be a table of settings"),
        ("data.sources=en", 'data.sources = "en" must be a list'),
        ("data.sources=[]", "data.sources = [] must have at least 1 item"),
        ("data.packing=pads", "did you mean 'pad'?"),
        ("data.skip_steps=9-3", "data: skip_steps: 9-3 runs backwards; write 3-9"),
        ("compute.device=gpu", 'compute.device = "gpu" must match pattern'),
        ("model.preset=tinny", "model: preset = 'tinny' is not known; choose one of internlm-7b, "),
        ("model.num_attention_heads=3", "hidden_size = 64 must be a multiple of num_attention_heads = 3"),
        ("model.rope_scaling.factor=2", "factor = 2.0 has no effect with kind = 'default'"),
        ("data.seq_len=999", "data.seq_len = 999 must be at most model.max_position_embeddings = 256"),
        (
            "batch.microbatch_sequences=3",
            "global_sequences = 8 must be a multiple of microbatch_sequences = 3",
        ),
        ("data.sources.0.name=code", "sources: the name 'code' stands twice"),
        ("data.validation=[{name='v', path='v', weight=1}]", "'v' has a weight"),
        ("validation.every_steps=5", "there is nothing to validate on"),
        ("sample.every_steps=5", "give at least one prompt"),
        (
            "optimizer.muon_lr=0.1",
            "optimizer: muon_lr = 0.1 has no effect with kind = 'adamw'; leave it at its default, 0.02, or set kind to "
            "'muon'",
        ),
        ("optimizer.muon_momentum=0.9", "muon_momentum = 0.9 has no effect with kind = 'adamw'"),
        ("schedule={kind='constant', min_lr=0.1}", "min_lr = 0.1 has no effect with kind = 'constant'"),
        ("schedule.decay_fraction=0.5", "decay_fraction = 0.5 has no effect with kind = 'cosine'"),
        ("model.init.std=0.01", "std = 0.01 has no effect with kind = 'internlm'"),
        (
            "model.rope_scaling={kind='linear', attention_factor=1.5}",
            "attention_factor = 1.5 has no effect with kind = 'linear'; leave it out, or set kind to 'yarn'",
        ),
        ("model.rope_scaling={kind='dynamic', beta_fast=40}", "beta_fast = 40.0 has no effect with kind = 'dynamic'"),
        (
            "model.rope_scaling={kind='linear', original_max_position_embeddings=9}",
            "original_max_position_embeddings = 9 has no effect with kind = 'linear'",
        ),
        ("compute.recompute_keep=matmuls", "recompute_keep = 'matmuls' has no effect with recompute = 0"),
        ("train.spike_window=5", "spike_window = 5 has no effect with spike = 'off'"),
        ("sample.prompts=['x']", "prompts = ['x'] has no effect with every_steps = 0; leave it at its default, [], or"),
    ],
)
def test_a_broken_rule_tells_name_value_and_rule(recipe: Path, override: str, told: str) -> None:
    assert told in wrong(recipe, override)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.weigth_decay=0", "did you mean optimizer.weight_decay?"),
        ("lr=1e-3", "lr = 0.001 is not a setting; did you mean optimizer.lr?"),
        ("model.seq_len=3", "did you mean data.seq_len?"),
        ("train.learning_rate=3", "did you mean optimizer.lr or"),
        (
            "data.sources.0.wieght=1",
            "data.sources.0.wieght = 1 is not a setting; did you mean data.sources.0.weight?",
        ),
        ("weigth=1", "did you mean data.sources.0.weight or data.validation.0.weight?"),
        ("load.zzz=1", "[load] has from"),
        ("modle={}", "did you mean model?"),
    ],
)
def test_an_unknown_setting_is_answered_with_a_known_one(recipe: Path, override: str, told: str) -> None:
    assert told in wrong(recipe, override)


def test_all_problems_are_told_at_once(recipe: Path) -> None:
    message = wrong(recipe, "train.steps=0", "lr=1", "data.packing=all", "data.sources.0.x=1")
    assert message.splitlines()[0] == f"{recipe}: 4 settings are wrong"
    assert [line.split()[0] for line in message.splitlines()[1:]] == [
        "data.sources.0.x", "data.packing", "train.steps", "lr",
    ]  # fmt: skip


def test_missing_settings_are_told_with_their_meaning() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"model": {"preset": "tiny"}, "data": {"sources": [{"name": "en"}]}, "train": {}})
    assert str(caught.value).splitlines() == [
        "3 settings are wrong",
        "  data.sources.0.path is missing; set data.sources.0.path (folder written by `tern data prepare`, "
        "or a folder or file of InternLM .bin + .bin.meta)",
        "  batch is missing; add [batch] (the batch)",
        "  train.steps is missing; set train.steps (optimizer steps of the whole run [steps])",
    ]


def test_bad_toml_is_told_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("out = 'x'\nseed = = 3\n")
    assert wrong(path).startswith(f"{path}:2: not TOML: Invalid value")
    path.write_text("out = 'x'\nseed = [1,")
    assert wrong(path).startswith(f"{path}:2: not TOML: ")
    path.write_bytes(b"out = '\xff'")
    assert wrong(path) == f"{path}: not UTF-8 text at byte 7; save it as UTF-8"


def test_recipes_are_found_by_bare_name(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recipe.parent / "recipes"
    folder.mkdir()
    recipe.rename(folder / "small.toml")
    monkeypatch.chdir(recipe.parent)
    assert load_config("small") == load_config("small.toml") == load_config("recipes/small.toml")
    assert list_recipes() == [Path("recipes/small.toml")]
    with pytest.raises(ConfigError, match=r"'smal' is not a file; did you mean small\? recipes here: recipes/small"):
        load_config("smal")


def test_recipes_beside_a_missing_one_are_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    assert str(recipe) in wrong(recipe.with_name("big.toml"))


def test_a_config_and_its_table_are_equal(recipe: Path) -> None:
    config = load_config(recipe, ["load.from=runs/x", "batch.rampup={start=2, increment=2, every=5}"])
    table = config_to_dict(config)
    assert table["load"] == {"from": "runs/x"}
    assert "tokenizer" not in table["data"]
    assert config_from_dict(table) == config


def test_a_setting_without_effect_is_let_through_at_its_default(recipe: Path) -> None:
    given = ["optimizer.muon_lr=0.02", "schedule.decay_fraction=0.2", "model.init.std=0.02", "sample.prompts=[]"]
    assert load_config(recipe, given) == load_config(recipe)


def test_an_explicit_none_leaves_the_preset_value(recipe: Path) -> None:
    table = config_to_dict(load_config(recipe))
    table["model"] = {"preset": "tiny-gqa", "num_key_value_heads": None}
    config = config_from_dict(table)
    assert config.model.kv_heads == 2
    assert config_from_dict(config_to_dict(config)) == config


def test_a_config_is_frozen(recipe: Path) -> None:
    config: Config = load_config(recipe)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


names = st.sampled_from(["kind", "preset", "sources", "rampup", "weight", "betas", "from", "lr"]) | st.text(max_size=4)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(list(Config.model_fields)), values, max_size=3))
def test_any_table_is_a_config_or_a_config_error(sections: dict[str, Any]) -> None:
    good = {
        "model": {"preset": "tiny"},
        "data": {"seq_len": 64, "sources": [{"name": "en", "path": "data/en"}]},
        "batch": {"global_sequences": 8},
        "train": {"steps": 10},
    }
    try:
        config = config_from_dict(good | sections)
    except ConfigError:
        return
    assert config_from_dict(config_to_dict(config)) == config


def test_settings_may_be_added_to_the_short_form_of_a_section(recipe: Path) -> None:
    recipe.write_text('parallel = "auto"\n' + RECIPE)
    parallel = load_config(recipe, ["parallel.cluster=h100x8", "parallel.tensor=2"]).parallel
    assert (parallel.auto, parallel.cluster, parallel.tensor) == (True, "h100x8", 2)
    assert not load_config(recipe, ["parallel.auto=false", "parallel.tensor=2"]).parallel.auto
    assert load_config(recipe, ["parallel.tensor=2", "parallel=auto"]).parallel.tensor == 1
    assert "there is no tensor in a value, 'other'" in wrong(recipe, "parallel=other", "parallel.tensor=2")


def test_none_leaves_out_a_section_that_may_be_left_out(tmp_path: Path) -> None:
    sft = tmp_path / "sft.toml"
    sft.write_text('load = { from = "a" }\ndata = { path = "b" }\n[adapter]\nrank = 4\n')
    assert load_sft_config(sft).adapter is not None
    assert load_sft_config(sft, ["adapter=none"]).adapter is None
    for override in ("optimizer=none", "adaptor=none"):
        with pytest.raises(ConfigError, match=override.removesuffix("=none")):
            load_sft_config(sft, [override])
