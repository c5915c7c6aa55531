"""Every recipe loads, says its hardware, and keeps the figures it states."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ternlm.config import Config, load_any_config, load_config, render
from ternlm.config.layout import resolve_layout

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_renders_to_itself(recipe: Path) -> None:
    config = load_any_config(recipe)
    assert Path(config.out).name == recipe.stem
    assert type(config).model_validate(tomllib.loads(render(config))) == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_its_hardware(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert "\n# Hardware: " in text.split("\nout =")[0]
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("name", "params", "seq_len", "tokens"),
    [
        ("internlm_7b", 7_321_948_160, 2048, 2.1e11),
        ("internlm_7b_8k", 7_321_948_160, 8192, 2.1e11),
        ("internlm_20b", 20_089_943_040, 4096, 2.3e12),
    ],
)
def test_the_ancestors_recipes_keep_its_hyper_parameters(name: str, params: int, seq_len: int, tokens: float) -> None:
    config = load_config(next(path for path in RECIPES if path.stem == name))
    assert config.model.num_params == params
    assert config.data.seq_len == config.model.max_position_embeddings == seq_len
    tokens_per_step = config.batch.global_sequences * config.data.seq_len
    assert tokens_per_step == 4 * 2**20
    assert tokens_per_step * config.train.steps == pytest.approx(tokens, rel=0.01)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.95), 0.01)
    assert optimizer.decay_all
    assert (config.schedule.kind, config.schedule.warmup_fraction) == ("cosine", 0.01)
    assert config.schedule.min_lr * optimizer.lr == pytest.approx(1e-5)
    assert config.model.init.kind == "internlm"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_devices_that_it_names(recipe: Path) -> None:
    named = re.search(r"^# Hardware: (\d+) x", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    config = load_any_config(recipe)
    if not isinstance(config, Config):  # of a model that isn't here: one of InternLM-7B's shape
        given = {
            name: getattr(config, name) for name in ("load", "adapter", "batch", "compute", "parallel", "sharding")
        }
        shape = {"model": {"preset": "internlm-7b"}, "train": {"steps": 1}}
        sources = {"sources": [{"name": "chats", "path": "chats"}], "packing": config.data.packing}
        config = Config.model_validate({**given, **shape, "data": sources})
    resolve_layout(config, int(named[1]) if named else 1)


@pytest.mark.slow
def test_the_debug_recipe_trains_by_the_commands_in_its_head(tmp_path: Path) -> None:
    (tmp_path / "ternlm").symlink_to(ROOT / "ternlm")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    head = (ROOT / "recipes/debug.toml").read_text(encoding="utf-8").split("\nout =")[0]
    prepare = re.findall(r"^#   (tern .*)$", head.replace("\\\n#", ""), re.MULTILINE)
    assert [command.split()[:3] for command in prepare] == [["tern", "data", verb] for verb in ("tokenizer", "prepare")]

    def run(command: str) -> str:
        script = f'tern() {{ "{sys.executable}" -m ternlm "$@"; }}\n' + command
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for command in prepare:
        run(command)
    assert "every id is in the vocabulary" in run("tern data inspect runs/debug/data --verify")
    run("tern train debug")
    lines = (tmp_path / "runs/debug/metrics.jsonl").read_text().splitlines()
    losses = [value for line in lines for name, value in json.loads(line).items() if name == "loss/total"]
    assert len(losses) == 30
    assert losses[-1] < 0.85 * losses[0]
    said = run("tern generate runs/debug --prompt 'def ' --prompt 'import ' --max-new-tokens 8 --seed 3")
    assert said.startswith("def ")
    assert "\nimport " in said
    assert said == run("tern generate runs/debug --prompt 'def ' --prompt 'import ' --max-new-tokens 8 --seed 3")
