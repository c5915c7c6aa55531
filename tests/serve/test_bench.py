"""The load test: what it sends, what it counts, and a real server under it."""

import asyncio
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("httpx")

from served import Served
from typer.testing import CliRunner

from ternlm.cli import app
from ternlm.config.section import ConfigError, UserError
from ternlm.serve.load import Answered, Mix, arrivals, draw, format_report, run_load, summarize

MIX = Mix(prompt_words=(2, 30), output_tokens=(3, 9), shared_words=20)


def test_requests_and_their_moments_come_from_the_seed() -> None:
    first, again, other = (draw(50, MIX, seed) for seed in (1, 1, 2))
    assert first == again != other
    lengths = [len(asked.prompt.split()) - 20 for asked in first]
    assert (min(lengths) >= 2, max(lengths) <= 30, len(set(lengths)) > 10) == (True, True, True)
    assert {asked.max_tokens for asked in first} == set(range(3, 10))
    assert len({" ".join(asked.prompt.split()[:20]) for asked in first}) == 1
    times = arrivals(4000, 5.0, 3)
    assert times == arrivals(4000, 5.0, 3) == sorted(times)
    assert times[-1] == pytest.approx(800, rel=0.1)
    gaps = [b - a for a, b in pairwise(times)]
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.03)
    assert arrivals(3, math.inf, 0) == [0, 0, 0]


def test_figures_are_those_of_what_was_answered() -> None:
    answered = [
        Answered(sent=1.0, first=1.5, last=3.5, prompt_tokens=10, cached_tokens=4, output_tokens=5),
        Answered(sent=2.0, first=2.1, last=2.1, prompt_tokens=20, output_tokens=1),
        Answered(sent=2.5, error="status 429"),
        Answered(sent=2.5, error="status 429"),
    ]
    report = summarize(answered)
    assert (report.requests, report.failed, report.errors) == (4, 2, {"status 429": 2})
    assert (report.seconds, report.output_tokens_per_second, report.requests_per_second) == (2.5, 6 / 2.5, 2 / 2.5)
    assert (report.prompt_tokens, report.cached_tokens) == (30, 4)
    assert report.time_to_first_token["p50"] == pytest.approx(0.1)
    assert report.time_to_first_token["p99"] == pytest.approx(0.5)
    assert report.time_per_output_token == pytest.approx({"mean": 0.5, "p50": 0.5, "p90": 0.5, "p99": 0.5})
    assert "status 429: 2" in format_report(report)
    nothing = summarize(answered[2:])
    assert (nothing.seconds, nothing.time_to_first_token) == (0.0, {})
    assert format_report(nothing)


def test_a_server_is_measured(server: Served) -> None:
    asked = draw(20, MIX, 4)
    report, answered = asyncio.run(run_load(server.url, asked, clients=6, extra={"ignore_eos": True}))
    assert (report.failed, report.errors) == (0, {})
    assert [each.output_tokens for each in answered] == [each.max_tokens for each in asked]
    assert report.output_tokens == sum(each.max_tokens for each in asked)
    assert report.prompt_tokens == sum(len(server.tokenizer.encode(each.prompt)) for each in asked)
    assert report.cached_tokens > 0
    assert all(each.sent < each.first <= each.last for each in answered)
    assert server.is_free()


def test_requests_arrive_at_their_rate(server: Served) -> None:
    _, answered = asyncio.run(run_load(server.url, draw(8, MIX, 4), rate=20.0, seed=5))
    for each, moment in zip(answered, arrivals(8, 20.0, 5), strict=True):
        assert moment <= each.sent < moment + 0.2


def test_what_fails_is_counted_by_its_reason(server: Served) -> None:
    asked = draw(4, Mix((2, 2), (4, 4)), 1) + draw(2, Mix((2, 2), (5000, 5000)), 1)
    report, _ = asyncio.run(run_load(server.url, asked))
    assert (report.failed, report.errors) == (2, {"status 400": 2})


def test_the_command_prints_and_writes_figures(server: Served, tmp_path: Path) -> None:
    words = ["--requests", "5", "--prompt-words", "2", "5", "--output-tokens", "2", "4"]
    done = CliRunner().invoke(app, ["bench", "serve", f"{server.url}/v1", *words, "--out", str(tmp_path / "f.json")])
    assert done.exit_code == 0, done.output
    assert "5, of which 0 failed" in done.output
    assert json.loads((tmp_path / "f.json").read_text())["failed"] == 0


def test_a_server_that_isnt_there_is_named() -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9.*can't be reached"):
        asyncio.run(run_load("http://127.0.0.1:9", draw(1, MIX, 1)))


def test_a_mix_without_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt_words = 5 to 2"):
        Mix(prompt_words=(5, 2))
