"""benchmarks/planner: reading rows, the report on a few of them, and the published report's freshness and bounds."""

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from ternlm.config.section import ConfigError
from ternlm.planner.fitted import fitted_constants

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "planner"
MODULES = ("columns", "rows", "fit", "judge", "pages", "reasons", "report")
PUBLISHED = Path(os.environ.get("TERNLM_SHARED", ROOT.parent / "shared")) / "reference" / "planner_rows.csv"
LLAMA = {
    "id": "a",
    "source": "someone",
    "model": "Llama-7B",
    "hidden_size": "4096",
    "num_layers": "32",
    "num_heads": "32",
    "intermediate_size": "11008",
    "gated_mlp": "1",
    "vocab_size": "32000",
    "gpu": "h100-80gb",
    "n_gpus": "16",
    "seq_len": "4096",
    "micro_batch_sequences": "2",
    "precision": "bf16",
    "shard_params": "16",
    "shard_grads": "16",
    "shard_optimizer": "16",
    "recompute": "none",
    "compiled": "1",
    "attention": "flash2",
    "tokens_per_s_per_gpu": "9000",
    "peak_memory_gib": "60",
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The benchmark's modules, which are siblings on the script's own path; train_cpu has one of the same name."""
    import sys

    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules: dict[str, ModuleType] = {name: __import__(name) for name in MODULES}
    yield SimpleNamespace(**modules)
    for name in MODULES:
        sys.modules.pop(name, None)


def write(bench, path, *rows, without=None):
    columns = [name for name in bench.columns.COLUMNS if name != without]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gpu": "h100-80"}, [":2: gpu = 'h100-80' must be a known device; did you mean h100-80gb?", "known.toml"]),
        ({"n_gpus": "many"}, [":2: n_gpus = 'many' must be a whole number of at least 1; write"]),
        ({"n_gpus": "1.5"}, [":2: n_gpus = '1.5' must be a whole number"]),
        ({"tokens_per_s_per_gpu": "-3"}, [":2: tokens_per_s_per_gpu = '-3' must be a number above 0; write"]),
        ({"peak_memory_gib": "nan"}, [":2: peak_memory_gib = 'nan' must be a number above 0"]),
        ({"seq_len": ""}, [":2: seq_len = '' must not be empty; write its value"]),
        ({"recompute": "some"}, [":2: recompute = 'some' must be one of none, selective, full; write"]),
        ({"shard_params": "3"}, [":2: shard_params = 3 must divide n_gpus / (tensor x pipeline) = 16; correct"]),
        ({"tensor": "3"}, [":2: n_gpus = 16 must be a multiple of tensor x pipeline x context = 3 x 1 x 1; correct"]),
        ({"num_heads": "33"}, [":2:", "hidden_size = 4096", "num_attention_heads = 33"]),
        ({"gpu": "a100-80gb", "precision": "fp8"}, [":2: precision = 'fp8' needs a device that has it", "bf16"]),
    ],
)
def test_a_row_that_cannot_be_right_names_line_value_rule_and_remedy(bench, tmp_path, changes, told):
    path = write(bench, tmp_path / "runs.csv", LLAMA | changes)
    with pytest.raises(ConfigError) as error:
        bench.rows.read_rows(path)
    for words in [*told, "runs.csv"]:
        assert words in str(error.value)


def test_a_missing_column_a_second_id_and_an_empty_file_are_refused(bench, tmp_path, capsys):
    path = write(bench, tmp_path / "runs.csv", LLAMA, without="seq_len")
    assert bench.report.main(["--rows", str(path)]) == 2
    assert "runs.csv:1: no column seq_len; all that" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"runs\.csv:3: id = 'a' .* also in line 2; write another"):
        bench.rows.read_rows(write(bench, path, LLAMA, LLAMA))
    with pytest.raises(ConfigError, match="has no rows"):
        bench.rows.read_rows(write(bench, path))
    with pytest.raises(ConfigError, match=r"nowhere\.csv: can't be read"):
        bench.rows.read_rows(tmp_path / "nowhere.csv")


def test_other_rows_get_a_report_of_their_own(bench, tmp_path):
    rows = [LLAMA, LLAMA | {"id": "b", "gpu": "a100-80gb", "tokens_per_s_per_gpu": "", "n_gpus": "64"}]
    path, page, figures = (tmp_path / name for name in ("runs.csv", "page.md", "figures.json"))
    write(bench, path, *rows)
    assert bench.report.main(["--rows", str(path), "--out", str(page), "--json", str(figures), "--quick"]) == 0
    one, two = json.loads(figures.read_text())["rows"]
    predicted = one["tokens_per_second"]["predicted"]
    assert two["tokens_per_second"]["published"] is None
    assert sum(one["share_of_step"].values()) == pytest.approx(1, rel=1e-3)
    assert sum(one["memory_gib"]["parts"].values()) == pytest.approx(one["memory_gib"]["predicted"], rel=1e-3)
    text = page.read_text()
    error = 100 * (predicted / 9000 - 1)
    assert re.search(rf"\| a \| someone .*\| 9000 \| {predicted:.0f} \| \{f'{error:+.1f}'} \|", text)
    assert "--rows runs.csv --quick" in text
    assert str(tmp_path) not in text + figures.read_text()


def test_the_readme_lists_the_columns_that_are_read(bench):
    lines = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert lines == [(name, c.meaning, c.blank or "needed") for name, c in bench.columns.COLUMNS.items()]


def test_the_published_report_is_of_the_constants_that_are_shipped(bench):
    text = (ROOT / "docs" / "planner.md").read_text()
    assert bench.pages.constants_section(fitted_constants()) in text
    figures = json.loads((ROOT / "benchmarks" / "results" / "planner" / "planner.json").read_text())
    assert figures["constants"] == pytest.approx(bench.judge.flat(fitted_constants()), rel=1e-3)
    for aim in figures["aims"]:
        assert f"| {aim['aim']} | {aim['rows']} |" in text


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_file(), reason="needs the published runs")
def test_predictions_of_published_runs_keep_the_bounds(bench):
    judged = bench.judge.judge(bench.rows.read_rows(PUBLISHED), fitted_constants(), cross_validate=False)
    timed = bench.judge.spread(j.error for j in judged)
    assert timed.count == 187
    assert timed.median <= 0.05
    assert timed.ninth_decile <= 0.15
    curves = bench.judge.spread(j.error for j in judged if bench.pages.is_of_curve(j))
    assert (curves.count, curves.worst <= 0.06) == (16, True)
    assert bench.judge.spread(j.memory_error for j in judged).median <= 0.05
    # The published report is of these predictions.
    shown = json.loads((ROOT / "benchmarks" / "results" / "planner" / "planner.json").read_text())["rows"]
    found = {j.row.id: (j.tokens_per_second, j.memory_gib) for j in judged}
    published = {row["id"]: (row["tokens_per_second"]["predicted"], row["memory_gib"]["predicted"]) for row in shown}
    assert found.keys() == published.keys()
    for name, figures in found.items():
        assert figures == pytest.approx(published[name], rel=1e-3), name


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_file(), reason="needs the published runs")
def test_sources_that_a_fit_has_not_seen_keep_the_bound(bench):
    rows = [row for row in bench.rows.read_rows(PUBLISHED) if row.tokens_per_second]
    found = bench.fit.left_out(rows, lambda row: row.source)
    assert bench.judge.spread(found[row.id] / row.tokens_per_second - 1 for row in rows).median <= 0.08
