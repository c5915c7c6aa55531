"""The command line: fast help, short errors, and options that reach the function they are for."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ternlm import __version__
from ternlm.cli import main
from ternlm.config import Config, UserError, config_from_dict, load_config

ROOT = Path(__file__).parents[1]
RECIPE = """# A small run.
[model]
preset = "tiny"
[data]
seq_len = 64
sources = [{ name = "en", path = "data/en" }]
[batch]
global_sequences = 8
[train]
steps = 10
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the recipe `small`."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/small.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tern(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run a command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["tern", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


class Spy:
    """Stands in for a module, so that its function is recorded instead of run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.error: BaseException | None = None
        fake = ModuleType(module)
        setattr(fake, function, self)
        monkeypatch.setitem(sys.modules, module, fake)

    def __call__(self, *args: Any, **options: Any) -> None:
        self.calls.append((args, options))
        if self.error:
            raise self.error


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['tern', '--help']\n"
        "from ternlm.cli import main\n"
        "try: main()\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'tokenizers', 'pydantic'} & sys.modules.keys()\n"
        "    print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for verb in ("quickstart", "train", "data", "config"):
        assert verb in done.stdout


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "ternlm", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"ternlm {__version__}\n"


def test_train_hands_over_the_checked_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain = Spy(monkeypatch, "ternlm.train.pretrain", "pretrain")
    assert tern(monkeypatch, "train", "small", "train.steps=3", "optimizer.lr=1e-3", "--resume", "never") == 0
    expected = load_config("small", ["train.steps=3", "optimizer.lr=1e-3"])
    assert pretrain.calls == [((expected, "never"), {})]
    assert tern(monkeypatch, "train", "small") == 0
    assert pretrain.calls[1] == ((load_config("small"), "auto"), {})


def test_a_wrong_setting_stops_before_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain = Spy(monkeypatch, "ternlm.train.pretrain", "pretrain")
    assert tern(monkeypatch, "train", "small", "train.step=3") == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "error: recipes/small.toml: a setting is wrong\n  train.step = 3 is not a setting; "
    )
    assert pretrain.calls == []


def test_what_the_user_can_put_right_has_no_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain = Spy(monkeypatch, "ternlm.train.pretrain", "pretrain")
    pretrain.error = UserError("data/en is not a folder")
    assert tern(monkeypatch, "train", "small") == 2
    assert capsys.readouterr().err == "error: data/en is not a folder\n"


def test_a_defect_of_ours_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain = Spy(monkeypatch, "ternlm.train.pretrain", "pretrain")
    pretrain.error = ValueError("not the user's fault")
    monkeypatch.setattr(sys, "argv", ["tern", "train", "small"])
    with pytest.raises(ValueError, match="not the user's fault"):
        main()


def test_an_interrupt_exits_with_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain = Spy(monkeypatch, "ternlm.train.pretrain", "pretrain")
    pretrain.error = KeyboardInterrupt()
    assert tern(monkeypatch, "train", "small") == 130


def test_quickstart_passes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    quickstart = Spy(monkeypatch, "ternlm.train.quickstart", "quickstart")
    assert tern(monkeypatch, "quickstart") == 0
    assert tern(monkeypatch, "quickstart", "--minutes", "0.5", "--out", "x", "--threads", "1") == 0
    assert quickstart.calls == [
        ((), {"out": Path("runs/quickstart"), "minutes": 4.0, "threads": 0}),
        ((), {"out": Path("x"), "minutes": 0.5, "threads": 1}),
    ]


def test_config_show_prints_a_recipe(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tern(monkeypatch, "config", "show", "small", "seed=3") == 0
    shown = config_from_dict(tomllib.loads(capsys.readouterr().out))
    assert shown == load_config("small", ["seed=3"])


def test_config_schema_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert tern(monkeypatch, "config", "schema") == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == {
        field.alias or name for name, field in Config.model_fields.items()
    }


def test_config_list_shows_first_lines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tern(monkeypatch, "config", "list") == 0
    assert capsys.readouterr().out == "recipes/small.toml: A small run.\n"
