"""Every recipe loads, says its hardware, and keeps the figures it states."""

import tomllib
from pathlib import Path

import pytest

from ternlm.config import config_from_dict, load_config, render

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_renders_to_itself(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.name == recipe.stem
    assert config_from_dict(tomllib.loads(render(config))) == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_its_hardware(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert "\n# Hardware: " in text.split("\nname =")[0]
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("name", "params", "seq_len", "tokens"),
    [
        ("internlm_7b", 7_321_948_160, 2048, 2.1e11),
        ("internlm_7b_8k", 7_321_948_160, 8192, 2.1e11),
        ("internlm_20b", 20_089_943_040, 4096, 2.3e12),
    ],
)
def test_the_ancestors_recipes_keep_its_hyper_parameters(
    name: str, params: int, seq_len: int, tokens: float
) -> None:
    config = load_config(next(path for path in RECIPES if path.stem == name))
    assert config.model.num_params == params
    assert config.data.seq_len == config.model.max_position_embeddings == seq_len
    assert config.tokens_per_step == 4 * 2**20
    assert config.tokens_per_step * config.train.steps == pytest.approx(tokens, rel=0.01)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.95), 0.01)
    assert optimizer.decay_all
    assert (config.schedule.kind, config.schedule.warmup_fraction) == ("cosine", 0.01)
    assert config.schedule.min_lr * optimizer.lr == pytest.approx(1e-5)
    assert config.model.init.kind == "internlm"
