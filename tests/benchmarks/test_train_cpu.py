"""benchmarks/train_cpu: its arithmetic, its data, its report, and a tiny run of TernLM alone."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bench_modules import modules_of

from ternlm.config.model import ModelConfig
from ternlm.planner.flops import training_flops_per_token

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "train_cpu"
MODULES = ("workloads", "data", "report", "run", "record", "steps")
TINY = (
    "--rounds 1 --warmup 1 --steps 2 --threads 1 --seq-len 64 --vocab-size 512 --hidden-size 32 --num-layers 1 "
    "--num-heads 2 --intermediate-size 48 --mean-document 20 --peers ternlm-eager"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The benchmark's modules, which are siblings on the script's own path."""
    with modules_of(FOLDER, MODULES, monkeypatch) as modules:
        yield modules


def result_of(bench: SimpleNamespace, tokens_per_s: dict[str, list[float]], memory: dict[str, int]) -> dict:
    """A finished result of the workload `vocab` with the given speeds, by round, and peak memories."""
    workload = bench.workloads.WORKLOADS["vocab"]
    args = SimpleNamespace(rounds=2, warmup=1, steps=1, threads=1)
    result = bench.run.describe(workload, [2048], args)
    for index in range(2):
        entry = {"sgemm": {"name": "sgemm", "flops_per_s": 1e11}}
        for config, speeds in tokens_per_s.items():
            entry[config] = {
                "name": config,
                "tokens_per_s": speeds[index],
                "peak_rss_bytes": memory[config],
                "first_step_end_seconds": 1.0,
                "losses": [11.5, 11.4],
                "boundaries": "one document a row",
                "versions": {"torch": "2.13.0"},
            }
        result["rounds"].append(entry)
    return result


def test_flops_equal_the_planners_causal_count(bench: SimpleNamespace) -> None:
    for workload in bench.workloads.WORKLOADS.values():
        shape = workload.shape
        config = ModelConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.intermediate_size,
            attention_bias=True,
        )
        assert workload.flops_per_token([2048]) == training_flops_per_token(config, 2048).causal


def test_short_documents_have_the_mean_that_the_workload_names(bench: SimpleNamespace, tmp_path: Path) -> None:
    workload = bench.workloads.WORKLOADS["packed"]
    lengths = bench.data.write_documents(workload, 128, tmp_path)
    tokens, ends = np.load(tmp_path / "tokens.npy"), np.load(tmp_path / "ends.npy")
    assert np.mean(lengths) == pytest.approx(workload.mean_document, rel=0.01)
    assert max(lengths) <= workload.seq_len
    assert ends.tolist() == np.cumsum(lengths).tolist()
    assert ends[-1] == len(tokens)
    assert tokens.max() < workload.shape.vocab_size


def test_every_second_round_is_reversed(bench: SimpleNamespace) -> None:
    assert bench.run.order_of_round(("a", "b", "c"), 0) == ("a", "b", "c")
    assert bench.run.order_of_round(("a", "b", "c"), 1) == ("c", "b", "a")


def test_ratios_are_paired_by_round(bench: SimpleNamespace) -> None:
    # Each round's own ratio is 1.5; the ratio of the medians would be another.
    speeds = {"ternlm": [150.0, 300.0], "hf": [100.0, 200.0]}
    text = bench.report.format_report(result_of(bench, speeds, {"ternlm": 5, "hf": 10}))
    assert "- met: at least 1.25 times HF Trainer: 1.5 (1.5 to 1.5)" in text


def test_an_aim_that_is_missed_or_not_measured_is_said(bench: SimpleNamespace) -> None:
    speeds = {"ternlm": [110.0, 110.0], "hf": [100.0, 100.0]}
    text = bench.report.format_report(result_of(bench, speeds, {"ternlm": 7, "hf": 10}))
    assert "- **not met**: at least 1.25 times HF Trainer: 1.1" in text
    assert "- **not met**: at most 0.6 times the peak memory of HF Trainer: 0.7" in text
    assert "- not measured: at least 1.25 times HF Trainer, torch_compile, use_cache" in text


def test_a_configuration_runs_only_data_it_is_made_for(bench: SimpleNamespace) -> None:
    workloads = bench.workloads.WORKLOADS
    assert not workloads["packed"].can_run("hf")
    assert not workloads["long"].can_run("trl")
    assert all(workload.can_run(config) for workload in workloads.values() for config in workload.configs)


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["long", "packed"])
def test_a_tiny_run_writes_speed_memory_and_losses(workload: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--out", str(tmp_path), "--workload", workload]
    subprocess.run([*command, *TINY.split()], check=True)
    result = json.loads((tmp_path / f"{workload}.json").read_text())
    measured = result["rounds"][0]["ternlm-eager"]
    assert measured["tokens_per_s"] > 0
    assert measured["peak_rss_bytes"] > 2**27
    assert measured["losses"][0] == pytest.approx(np.log(512), abs=0.5)
    assert "The workload was resized" in (tmp_path / f"{workload}.md").read_text()
