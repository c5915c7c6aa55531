"""benchmarks/sft_cpu: the data that each library is given, the report, and how real tokens are counted."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bench_modules import modules_of

from ternlm.data.pack import pack
from ternlm.data.source import Window

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "sft_cpu"
MODULES = ("workloads", "data", "report", "run", "job", "steps", "ternlm_steps", "ternlm_sft")
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' + message.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The benchmark's modules, which are siblings on the script's own path."""
    with modules_of(FOLDER, MODULES, monkeypatch) as modules:
        yield modules


def result_of(bench: SimpleNamespace, speeds: dict[str, list[float]], digests: dict[str, str]) -> dict:
    """A finished result of the workload `full` with the given speeds, by round; memory is speed in GiB."""
    args = SimpleNamespace(rounds=2, warmup=1, steps=1, threads=1, data=Path("train.jsonl"))
    result = bench.run.describe(bench.workloads.WORKLOADS["full"], 3, args)
    for index in range(2):
        entry = {}
        for config, found in speeds.items():
            entry[config] = {
                "name": config,
                "tokens_per_s": found[index],
                "step_tokens": [2000],
                "peak_rss_bytes": found[index] * 2**30,
                "first_step_end_seconds": 1.0,
                "losses": [1.5, 1.25],
                "num_trained": 1234,
                "boundaries": "one sample a row",
                "data": {"samples": 3, "tokens": 30, "learnt_tokens": 12, "digest": digests[config]},
                "versions": {"torch": "2.13.0"},
            }
        result["rounds"].append(entry)
    return result


def test_each_library_gets_the_same_pairs_in_its_own_form(bench: SimpleNamespace, tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    records = [{"question": f"{n} + {n}?", "answer": f"{2 * n}\n"} for n in range(3)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    bench.data.write_data(bench.data.read_pairs(source, 2), TEMPLATE, tmp_path / "data")
    messages = [json.loads(line) for line in (tmp_path / "data/messages.jsonl").read_text().splitlines()]
    halves = [json.loads(line) for line in (tmp_path / "data/prompt_completion.jsonl").read_text().splitlines()]
    alpaca = json.loads((tmp_path / "data/litgpt/train.json").read_text())
    assert [m["messages"] for m in messages] == [h["prompt"] + h["completion"] for h in halves]
    assert alpaca == [{"instruction": "0 + 0?", "output": "0\n"}, {"instruction": "1 + 1?", "output": "2\n"}]
    assert (tmp_path / "data/litgpt/style.txt").read_text() == "<user>{question}</s><assistant>"


def test_a_digest_depends_on_ids_and_mask_and_not_on_the_order(bench: SimpleNamespace) -> None:
    first, second, unmasked = ([5, 6, 7], [-100, 6, 7]), ([8, 9], [-100, 9]), ([8, 9], [8, 9])
    said = bench.job.describe_samples([first, second])
    assert said == bench.job.describe_samples([second, first])
    assert (said["samples"], said["tokens"], said["learnt_tokens"]) == (2, 5, 3)
    assert said["digest"] != bench.job.describe_samples([first, unmasked])["digest"]


def test_neither_padding_nor_what_follows_an_answer_is_a_real_token(bench: SimpleNamespace) -> None:
    # Two samples of 4 and 4 tokens in a row of 10; after the second one's answer comes another token.
    window = Window(
        ids=np.arange(1, 9, dtype=np.uint32),
        lengths=np.array([4, 4]),
        trained=np.array([0, 0, 1, 1, 0, 1, 1, 0], dtype=bool),
        documents=np.array([0, 1]),
    )
    batch = pack([window], [0], ("bench",), seq_len=10, across=False)
    tokens: list[int] = []
    assert list(bench.ternlm_sft.count_tokens([[batch, batch]], tokens)) == [[batch, batch]]
    assert tokens == [14]


def test_ternlms_settings_are_valid_for_every_workload(bench: SimpleNamespace) -> None:
    args = SimpleNamespace(warmup=1, steps=2, threads=2)
    for workload in bench.workloads.WORKLOADS.values():
        job = bench.run.make_job(workload, "ternlm", Path("model"), Path("folder"), args)
        config = bench.ternlm_sft.make_config(job)
        assert config.learning_rate() == workload.lr
        assert (config.adapter.scale if config.adapter else 0) == (2.0 if workload.rank else 0)


def test_aims_hold_for_each_variant_of_a_peer(bench: SimpleNamespace) -> None:
    # Each round's own ratio is 2; the ratio of the medians would be another.
    speeds = {"ternlm": [10.0, 40.0], "trl": [5.0, 20.0], "trl-single": [10.0, 40.0]}
    text = bench.report.format_report(result_of(bench, speeds, dict.fromkeys(speeds, "abc")))
    assert "- met: at least 1.6 times TRL SFTTrainer, packing (bfd): 2 (2 to 2)" in text
    assert "- **not met**: at most 0.7 times the peak memory of TRL SFTTrainer, packing (bfd): 2 (2 to 2)" in text
    assert "- **not met**: at least 1.6 times TRL SFTTrainer, samples one by one: 1 (1 to 1)" in text
    assert "- not measured: at least 1.6 times TRL SFTTrainer, samples one by one, torch_compile" in text
    assert "All configurations made the same token ids" in text
    assert "a tenth recomputed | 1.500 | 1.250 |" in text


def test_other_samples_are_said(bench: SimpleNamespace) -> None:
    speeds = {"ternlm": [1.0, 1.0], "trl": [1.0, 1.0]}
    text = bench.report.format_report(result_of(bench, speeds, {"ternlm": "abc", "trl": "def"}))
    assert "**Configurations made different samples of the data**" in text


def test_litgpt_trains_adapters_alone(bench: SimpleNamespace) -> None:
    workloads = bench.workloads.WORKLOADS
    assert not workloads["full"].can_run("litgpt-1")
    assert all(workload.can_run(config) for workload in workloads.values() for config in workload.configs)


def test_samples_of_a_step_are_whole_micro_batches(bench: SimpleNamespace) -> None:
    micro = [int(c.partition("-")[2]) for c in bench.workloads.CONFIGURATIONS if c.startswith("litgpt")]
    assert all(bench.job.Job.samples % size == 0 for size in micro)
