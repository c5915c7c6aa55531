import sysconfig
from pathlib import Path

import pytest

from ternlm.config import ConfigError, load_config
from ternlm.train.quickstart import find_corpus, quickstart_config

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"


def test_held_out_files_are_a_small_fixed_part_that_is_not_trained_on():
    corpus = find_corpus(LIBRARY)
    assert not set(corpus.training) & set(corpus.held_out)
    assert 0.005 < len(corpus.held_out) / len(corpus.training) < 0.08
    assert corpus == find_corpus(LIBRARY)


def test_nothing_that_users_installed_is_trained_on():
    corpus = find_corpus(LIBRARY)
    assert not any("site-packages" in path.parts for path in corpus.training + corpus.held_out)


def test_a_python_without_its_librarys_source_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"holds 0 Python files.*tern data prepare"):
        find_corpus(tmp_path)


def test_the_recipe_is_what_quickstart_runs():
    recipe = load_config(RECIPE)
    ours = quickstart_config(Path("runs/quickstart"), recipe.train.steps, 4.0, threads=0)
    assert recipe == ours
