"""The verb `tern simulate`: what it prints and writes, and how it refuses."""

import errno
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest

from ternlm.cli import main
from ternlm.config import load_config
from ternlm.config.layout import resolve_layout
from ternlm.planner.auto import take_best
from ternlm.train.simulate_report import human_bytes, human_flops, run_simulation

RECIPE = """# A small run, whose data don't exist.
[model]
preset = "tiny"
[data]
seq_len = 64
sources = [{ name = "en", path = "data/en" }]
[batch]
global_sequences = 16
[train]
steps = 10
[compute]
dtype = "bfloat16"
"""


@pytest.fixture
def tern(tmp_path, monkeypatch):
    """Run a command line in a folder with the recipe `small.toml`; return its exit code."""
    (tmp_path / "small.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tern", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0)

    return run


def test_the_verb_prints_tables_and_writes_the_same_figures_without_any_data(tern, tmp_path, capsys):
    overrides = ["sharding.optimizer=8", "data.seq_len=128"]
    files = ["--json", "figures.json", "--timeline", "trace.json"]
    with warnings.catch_warnings(record=True) as warned:
        assert tern("simulate", "small.toml", *overrides, "--world-size", "16", "--rank", "3", *files) == 0
    assert [str(w.message) for w in warned if "torch" in w.filename] == []
    printed, told = capsys.readouterr()
    assert told == ""
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["layout"]["optimizer"] == 8
    assert figures["place"]["rank"] == 3
    assert figures["microbatch_tokens"] == 128
    peak, rest = figures["memory_bytes"]["peak"], figures["memory_bytes"]["rest"]
    rows = [line.split() for line in printed.splitlines()]
    for kind in peak:
        assert [kind, f"{peak[kind] / 2**20:.2f}", f"{rest[kind] / 2**20:.2f}"] in rows
    assert ["memory,", "MiB", "peak", "at", "rest"] in rows
    assert f"tokens in bfloat16, {human_flops(figures['flops'])}\n" in printed
    for one in figures["collectives"]:
        nodes = "between" if one["between_nodes"] else "inside"
        start = [one["operation"], one["axis"], str(one["ranks"]), nodes, str(one["count"])]
        sizes = [*human_bytes(one["payload_bytes"]).split(), *human_bytes(one["sent_bytes"]).split()]
        assert [*start, *sizes] in rows
    assert {one["axis"] for one in figures["collectives"]} == {"shard", "replicas", "world"}
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"]["rank"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world-size", "16", "--rank", "16"], "--rank = 16 must be at least 0 and below --world-size = 16"),
        (["parallel.tensor=3", "--world-size", "16"], "must divide the number of ranks, 16"),
        (["--world-size", "16", "--json", "none/f.json"], "--json = none/f.json must lie in a folder that exists"),
        (["--world-size", "16", "--timeline", "none/t.json"], "--timeline = none/t.json must lie in a folder"),
        (["--world-size", "16", "--json", "."], "--json = . can't be written (Is a directory); choose another file"),
        (["--world-size", "16", "--timeline", "t" * 300], "can't be written (File name too long)"),
        (["data.seqlen=3", "--world-size", "16"], "data.seqlen"),
    ],
)
def test_what_cannot_be_simulated_is_refused_with_exit_code_2(tern, capsys, words, message):
    assert tern("simulate", "small.toml", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_bytes_are_written_with_their_unit():
    written = [human_bytes(n) for n in (0, 1000, 1023, 1536, 3 * 2**30, 700 * 2**40)]
    assert written == ["0 B", "1000 B", "1023 B", "1.5 KiB", "3 GiB", "700 TiB"]


def test_operations_are_written_with_their_unit():
    written = [human_flops(n) for n in (4.5e6, 1.23e9, 9.9949e11, 1.5e12, 1.772e14, 3e15)]
    assert written == ["4.5 MFLOP", "1.23 GFLOP", "999 GFLOP", "1.5 TFLOP", "177 TFLOP", "3,000 TFLOP"]


def test_a_layout_left_to_the_planner_is_the_one_that_training_would_take(tern, tmp_path, capsys):
    auto = ["small.toml", "parallel.auto=true", "data.seq_len=128", "--world-size", "4", "--json", "figures.json"]
    assert tern("simulate", *auto) == 2
    assert "parallel.auto = true needs parallel.cluster" in capsys.readouterr().err
    assert tern("simulate", *auto, "parallel.cluster=h100x2") == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    config = load_config("small.toml", ["data.seq_len=128", "parallel.auto=true", "parallel.cluster=h100x2"])
    taken = resolve_layout(take_best(config, 4), 4)
    assert figures["layout"] == {**asdict(taken), "data": taken.data}
    assert figures["devices_per_node"] == 2


def test_tables_are_printed_though_a_file_cannot_be_written_after_all(tern, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        run_simulation(load_config("small.toml"), 1, json_file=Path("figures.json"))
    assert "memory, MiB" in capsys.readouterr().out
