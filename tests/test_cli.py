"""The command line: fast help, short errors, and options that reach the function they are for."""

import io
import json
import logging
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ternlm import __version__
from ternlm.cli import _StderrNow, main
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
        self.vocab_size = 0  # of the tokenizer that a call returns
        fake = ModuleType(module)
        setattr(fake, function, self)
        monkeypatch.setitem(sys.modules, module, fake)

    def __call__(self, *args: Any, **options: Any) -> "Spy":
        self.calls.append((args, options))
        if self.error:
            raise self.error
        return self


@pytest.fixture
def continue_texts(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch, "ternlm.infer.text", "continue_texts")


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch, continue_texts: Spy) -> Spy:
    return Spy(monkeypatch, "ternlm.train.pretrain", "pretrain")


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
    for verb in ("quickstart", "train", "generate", "data", "config"):
        assert verb in done.stdout


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "ternlm", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"ternlm {__version__}\n"


def test_train_hands_over_the_checked_config(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pretrain: Spy, continue_texts: Spy
) -> None:
    assert tern(monkeypatch, "train", "small", "train.steps=3", "optimizer.lr=1e-3", "--resume", "never") == 0
    expected = load_config("small", ["train.steps=3", "optimizer.lr=1e-3"])
    assert pretrain.calls == [((expected, "never", continue_texts), {})]
    assert tern(monkeypatch, "train", "small") == 0
    assert pretrain.calls[1] == ((load_config("small"), "auto", continue_texts), {})


def test_a_wrong_setting_stops_before_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pretrain: Spy
) -> None:
    assert tern(monkeypatch, "train", "small", "train.step=3") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: recipes/small.toml: a setting is wrong\n  train.step = 3 is not a setting; ")
    assert pretrain.calls == []


def test_a_bad_layout_stops_before_torch_loads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pretrain: Spy
) -> None:
    assert tern(monkeypatch, "train", "small", "parallel.tensor=3") == 2
    assert "must divide the number of ranks, 1; start a multiple" in capsys.readouterr().err
    assert pretrain.calls == []
    assert tern(monkeypatch, "train", "small", "parallel.tensor=3", "parallel.auto=true") == 0


def test_what_the_user_can_put_right_has_no_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pretrain: Spy
) -> None:
    pretrain.error = UserError("data/en is not a folder")
    assert tern(monkeypatch, "train", "small") == 2
    assert capsys.readouterr().err == "error: data/en is not a folder\n"


def test_a_defect_of_ours_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch, pretrain: Spy) -> None:
    pretrain.error = ValueError("not the user's fault")
    monkeypatch.setattr(sys, "argv", ["tern", "train", "small"])
    with pytest.raises(ValueError, match="not the user's fault"):
        main()


def test_an_interrupt_exits_with_130(folder: Path, monkeypatch: pytest.MonkeyPatch, pretrain: Spy) -> None:
    pretrain.error = KeyboardInterrupt()
    assert tern(monkeypatch, "train", "small") == 130


def test_quickstart_passes_its_options(monkeypatch: pytest.MonkeyPatch, continue_texts: Spy) -> None:
    quickstart = Spy(monkeypatch, "ternlm.train.quickstart", "quickstart")
    assert tern(monkeypatch, "quickstart") == 0
    assert tern(monkeypatch, "quickstart", "--minutes", "0.5", "--out", "x", "--threads", "1") == 0
    assert quickstart.calls == [
        ((Path("runs/quickstart"), 4.0, 0, continue_texts), {}),
        ((Path("x"), 0.5, 1, continue_texts), {}),
    ]


def test_data_tokenizer_passes_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    train = Spy(monkeypatch, "ternlm.data.train_tokenizer", "train_tokenizer")
    train.vocab_size = 1000
    options = "--vocab-size 1000 --format text --include *.py --on-error skip --text-document line --sample-mb 2"
    assert tern(monkeypatch, "data", "tokenizer", "a", "b", "--out", "t", *options.split()) == 0
    positional = ([Path("a"), Path("b")], 1000, Path("t"))
    named = {"format": "text", "include": "*.py", "field": "text", "text_document": "line", "on_error": "skip"}
    assert train.calls == [(positional, named | {"sample_bytes": 2_000_000})]
    assert capsys.readouterr().out == "t: a tokenizer of 1,000 tokens\n"


def test_data_prepare_passes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = Spy(monkeypatch, "ternlm.data.prepare", "prepare")
    needed = ["data", "prepare", "a", "--tokenizer", "t", "--out", "o"]
    options = "--workers 3 --part 2/4 --on-error skip --format jsonl --field body --unit-bytes 99 --no-bos --no-eos"
    assert tern(monkeypatch, *needed) == 0
    assert tern(monkeypatch, *needed, *options.split()) == 0
    (first, defaults), (second, given) = prepare.calls
    assert first == second == ([Path("a")], Path("t"), Path("o"))
    assert {name: defaults[name] for name in ("workers", "part", "unit_bytes", "bos", "eos")} == {
        "workers": None, "part": None, "unit_bytes": None, "bos": True, "eos": True,
    }  # fmt: skip
    assert defaults["console"] is not None
    changed = {name: value for name, value in given.items() if name != "console" and value != defaults[name]}
    assert changed == {
        "workers": 3, "part": "2/4", "on_error": "skip", "format": "jsonl", "field": "body", "unit_bytes": 99,
        "bos": False, "eos": False,
    }  # fmt: skip


def test_data_inspect_passes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    inspect = Spy(monkeypatch, "ternlm.data.inspect", "inspect")
    assert tern(monkeypatch, "data", "inspect", "d", "--documents", "1", "--chars", "9", "--tokenizer", "t") == 0
    assert tern(monkeypatch, "data", "inspect", "d", "--verify") == 0
    assert tern(monkeypatch, "data", "inspect", "d", "--plain", "--seq-len", "9") == 0
    usual = {"documents": 3, "chars": 600, "tokenizer": None, "verify": False, "seq_len": None, "plain": False}
    assert inspect.calls == [
        ((Path("d"),), usual | {"documents": 1, "chars": 9, "tokenizer": Path("t")}),
        ((Path("d"),), usual | {"verify": True}),
        ((Path("d"),), usual | {"seq_len": 9, "plain": True}),
    ]


def test_an_unknown_choice_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tern(monkeypatch, "data", "inspect") == 2
    words = "data prepare a --tokenizer t --out o --on-error ignore"
    assert tern(monkeypatch, *words.split()) == 2
    told = capsys.readouterr().err
    assert "'fail'" in told
    assert "'skip'" in told


def test_generate_names_a_checkpoint_that_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tern(monkeypatch, "generate", "nowhere", "--prompt", "x") == 2
    assert capsys.readouterr().err.startswith("error: nowhere: no such folder")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint of random weights, tied, and its tokenizer."""
    import torch

    from ternlm.checkpoint.save import Saver
    from ternlm.checkpoint.tensors import model_tensors
    from ternlm.config import CheckpointConfig, ModelConfig
    from ternlm.data.tokenizer import train_bpe
    from ternlm.model.decoder import build_model
    from ternlm.parallel.mesh import one_rank
    from ternlm.parallel.pieces import make_pieces

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = train_bpe(iter(["The tern flies. " * 9]), 262)
    config = ModelConfig(preset="tiny", vocab_size=262, tie_word_embeddings=True)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    run = tmp_path_factory.mktemp("run")
    state = {"model": config.model_dump(mode="json", exclude_none=True)}
    mesh = one_rank(torch.device("cpu"))
    saver = Saver(run, CheckpointConfig(wait=True), tokenizer.save, mesh)
    saver.save(1, model_tensors(make_pieces(model, mesh)), state)
    return run


def test_generate_writes_the_same_text_streamed_or_with_others(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-new-tokens", "12", "--seed", "5", "--device", "cpu", "--dtype", "float32"]
    assert tern(monkeypatch, "generate", str(checkpoint), "--prompt", "The", *options) == 0
    alone = capsys.readouterr().out
    assert tern(monkeypatch, "generate", str(checkpoint), "--prompt", "The", "--prompt", "flies", *options) == 0
    together = capsys.readouterr().out
    assert alone.startswith("The")
    assert len(alone) > len("The\n")
    assert together.startswith(alone + "flies")


def test_generate_computes_in_the_dtype_asked_for(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ternlm.infer import text

    seen = []

    def note(*args: Any) -> None:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)

    monkeypatch.setattr(text, "stream_text", note)
    for dtype in ("float32", "bfloat16"):
        words = ["generate", str(checkpoint), "--prompt", "x", "--device", "cpu", "--dtype", dtype]
        assert tern(monkeypatch, *words) == 0
    assert seen == [torch.float32, torch.bfloat16]


def test_log_lines_go_above_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    handler, stand_in = _StderrNow(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stand_in)  # as a bar does while it is shown
    handler.emit(logging.makeLogRecord({"msg": "saved"}))
    assert stand_in.getvalue() == "saved\n"


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
