"""benchmarks/serve_cpu: the same requests for every server, figures of a server that runs, the report and its aims."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
from bench_modules import modules_of
from served import write_tiny

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "serve_cpu"
MODULES = ("servers", "report", "run")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The benchmark's modules, which are siblings on the script's own path."""
    with modules_of(FOLDER, MODULES, monkeypatch) as modules:
        yield modules


def arguments(**changed: object) -> SimpleNamespace:
    return SimpleNamespace(**{"rounds": 2, "threads": 1, "loads": "1,8,32,shared", "timeout": 120.0} | changed)


def result_of(bench: SimpleNamespace, speeds: dict[str, list[float]]) -> dict:
    """A finished result with the given speeds of all loads, by round; memory is speed in GiB."""
    result = bench.run.describe(tuple(speeds), arguments())
    for index in range(2):
        entry = {}
        for name, found in speeds.items():
            figures = {
                f"{load}.{what}": found[index]
                for load in bench.servers.LOADS
                for what in ("tokens_per_s", "first_token_s", "token_s")
            }
            entry[name] = {"start_seconds": 1.0, "peak_rss_bytes": found[index] * 2**30, "versions": {"torch": "2"}}
            entry[name] |= figures
        result["rounds"].append(entry)
    return result


def test_ratios_are_paired_by_round_and_aims_judged_by_their_median(bench: SimpleNamespace) -> None:
    result = result_of(bench, {"ternlm": [30.0, 60.0], "hf": [10.0, 60.0], "vllm": [40.0, 80.0]})
    text = bench.report.format_report(result)
    assert "| transformers serve, continuous batching, float32 | 35.0 (10.0 to 60.0) | 2.00 (1.00 to 3.00) |" in text
    assert "- met: tern serve, float32 at least 1.5 times transformers serve, continuous batching, float32, 1" in text
    assert "- **not met**: tern serve, float32 at least 1 times vLLM, compiled, float32, 8 clients: 0.75" in text
    assert "- not measured: tern serve, float32 at least 1 times llama.cpp's server, float32, 8 clients" in text


def test_a_server_that_failed_is_shown_with_its_reason(bench: SimpleNamespace) -> None:
    result = result_of(bench, {"ternlm": [30.0, 60.0]})
    result["configs"].append("vllm")
    for entry in result["rounds"]:
        entry["vllm"] = {"name": "vllm", "error": "it ended with status 1 before it answered"}
    text = bench.report.format_report(result)
    assert "| vLLM, compiled, float32 | failed: it ended with status 1 before it answered |" in text


def test_a_server_that_does_not_start_is_an_error_with_its_reason(bench: SimpleNamespace, tmp_path: Path) -> None:
    bench.servers.SERVERS["broken"] = bench.servers.Server("broken", None, lambda models, port: ["-c", "exit(3)"])
    try:
        found = bench.run.measure("broken", Path(sys.prefix), None, tmp_path, arguments())
    finally:
        del bench.servers.SERVERS["broken"]
    assert found == {"name": "broken", "error": "it ended with status 3 before it answered"}


@pytest.mark.slow
def test_a_server_is_measured_and_leaves_nothing_running(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.servers.LOADS, "1", bench.servers.Load("1 client", 1, 2))
    monkeypatch.setattr(bench.run, "PROMPT_WORDS", (5, 9))
    models = bench.servers.Models(write_tiny(tmp_path / "model"), {})
    found = bench.run.measure("ternlm", Path(sys.prefix), models, tmp_path, arguments(loads="1"))
    assert "error" not in found
    assert found["1.tokens_per_s"] > 1
    assert found["peak_rss_bytes"] > 2**26
    assert found["versions"]["torch"]


def test_fewer_tokens_than_were_asked_for_are_an_error(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def sent(url: str, asked: list, **options: object) -> tuple[SimpleNamespace, list]:
        return SimpleNamespace(failed=0, output_tokens=sum(each.max_tokens for each in asked) - 1), []

    monkeypatch.setattr(bench.run, "run_load", sent)
    load, server = bench.servers.LOADS["8"], bench.servers.SERVERS["ternlm"]
    with pytest.raises(RuntimeError, match="tokens came, where"):
        asyncio.run(bench.run._send("http://127.0.0.1:1", load, server, None, "8", 5.0))
