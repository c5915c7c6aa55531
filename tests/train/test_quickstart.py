import json
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from ternlm.config import ConfigError, load_config, render
from ternlm.train import quickstart as module
from ternlm.train.quickstart import Corpus, find_corpus, quickstart, quickstart_config

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


def test_a_library_inside_site_packages_is_read_and_what_cannot_be_read_is_passed_over(tmp_path):
    library = tmp_path / "site-packages" / "python3"
    (library / "site-packages").mkdir(parents=True)
    for number in range(100):
        (library / f"a{number}.py").write_text("x = 1\n")
    (library / "site-packages" / "other.py").write_text("y = 1\n")
    (library / "gone.py").symlink_to("nowhere")
    corpus = find_corpus(library)
    assert {path.name for path in corpus.training + corpus.held_out} == {f"a{number}.py" for number in range(100)}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A quickstart's folder that is planned and has its data; training ends as told by the returned object."""
    run = SimpleNamespace(stopped=None, progress=SimpleNamespace(step=3))
    monkeypatch.setattr(module, "find_corpus", lambda library: Corpus([], []))
    monkeypatch.setattr(module, "_prepare_data", lambda *args: None)
    monkeypatch.setattr(module, "pretrain", lambda *args: run)
    (tmp_path / "config.toml").write_text(render(quickstart_config(tmp_path, 500, 4.0, 0)))
    (tmp_path / "quickstart.json").write_text(json.dumps({"bpb_before": 8.0}))
    return run


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupted_quickstart_ends_at_once_and_says_how_to_go_on(prepared, tmp_path, capsys, number, monkeypatch):
    prepared.stopped = f"received {number}"
    monkeypatch.setattr(module, "validate", lambda run: pytest.fail("validated after an interrupt"))
    assert quickstart(tmp_path, 4.0, 0, lambda *args: pytest.fail("sampled after an interrupt")) is prepared
    said = " ".join(capsys.readouterr().out.split())
    assert "saved at step 3 of 500; to go on: tern quickstart --minutes 4 --threads 0 --out" in said
    assert "goes on as it began" not in said


def test_other_options_than_a_begun_quickstarts_are_not_silently_ignored(prepared, tmp_path, capsys):
    prepared.stopped = "received SIGINT"
    quickstart(tmp_path, 10.0, 3, lambda *args: [])
    said = " ".join(capsys.readouterr().out.split())
    assert "with --minutes 4, not 10; for other settings choose another --out" in said
    assert "with --threads 0, not 3;" in said


def test_a_python_without_its_librarys_source_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"holds 0 Python files.*tern data prepare"):
        find_corpus(tmp_path)


def test_the_recipe_is_what_quickstart_runs():
    recipe = load_config(RECIPE)
    ours = quickstart_config(Path("runs/quickstart"), recipe.train.steps, 4.0, threads=0)
    assert recipe == ours
