"""The verb `tern simulate`: what it prints and writes, and how it refuses."""

import json
import sys
import warnings

import pytest

from ternlm.cli import main
from ternlm.train.simulate_report import human_bytes

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
        assert [kind, f"{peak[kind] / 2**30:.2f}", f"{rest[kind] / 2**30:.2f}"] in rows
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
        (["data.seqlen=3", "--world-size", "16"], "data.seqlen"),
    ],
)
def test_what_cannot_be_simulated_is_refused_with_exit_code_2(tern, capsys, words, message):
    assert tern("simulate", "small.toml", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_bytes_are_written_with_their_unit():
    written = [human_bytes(n) for n in (0, 1000, 1023, 1536, 3 * 2**30, 700 * 2**40)]
    assert written == ["0 B", "1000 B", "1023 B", "1.5 KiB", "3 GiB", "700 TiB"]
