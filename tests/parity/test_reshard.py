"""A checkpoint of any layout goes on on any other, as if one rank had trained all along."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import settings_of
from rank_steps import errors, merged, run_steps, start
from ranks import run_ranks

from ternlm.checkpoint.tensors import Rectangle, optimizer_tensors
from ternlm.config.support import parse_case
from ternlm.train.run import Run

BEFORE, AFTER = 2, 2
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"model": {"tie_word_embeddings": True}},
    "muon": {"optimizer": {"kind": "muon"}, "model": {"qk_norm": True}},
    "rampup": {"batch": {"rampup": {"start": 8, "increment": 8, "every": 1}}},
}
BATCHES = {"plain": 24, "tied": 24, "muon": 24, "rampup": 24}  # 1, 2, 3, 4, 6 and 8 ranks divide it
ALLOWED = {"loss": 2e-5, "norm": 2e-5, "metrics": 2e-5, "weights": 1e-5, "states": 1e-4}


class Pair(NamedTuple):
    """Saved by the first layout, gone on with by the second (lines as in ternlm/config/support.py)."""

    model: str
    source: str
    target: str


PAIRS = [
    Pair("plain", "1:", "4: tensor-sequence=2 sharding=2/2/2"),
    Pair("plain", "1:", "3: sharding=1/1/3"),
    Pair("plain", "2: context-ring=2", "8: sharding=2/2/4"),
    Pair("plain", "2: context-ring=2", "4: sharding=1/2/4"),
    Pair("plain", "3: sharding=3/3/3", "4: tensor=4"),
    Pair("plain", "4: tensor-sequence=2 sharding=2/2/2", "1:"),
    Pair("plain", "4: tensor-sequence=2 sharding=2/2/2", "2: pipeline-interleaved=2"),
    Pair("plain", "4: sharding=1/2/4", "2: tensor=2"),
    Pair("plain", "8: sharding=1/2/4", "1:"),
    Pair("plain", "8: sharding=1/2/4", "2: sharding=1/1/2"),
    Pair("plain", "8: sharding=1/2/4", "3: sharding=3/3/3"),
    Pair("plain", "8: sharding=1/2/4", "4: tensor-sequence=2 pipeline-1f1b=2"),
    Pair("plain", "4: pipeline-zero_bubble=2 sharding=1/1/2", "3: sharding=1/3/3"),
    Pair("plain", "4: pipeline-zero_bubble=2 sharding=1/1/2", "1:"),
    Pair("tied", "4: tensor-sequence=2 sharding=1/2/2", "3: sharding=3/3/3"),
    Pair("tied", "3: sharding=1/1/3", "2: context-all_to_all=2"),
    Pair("muon", "4: tensor=2 sharding=2/2/2", "2: pipeline-1f1b=2"),
    Pair("muon", "3: sharding=1/1/3", "4: sharding=2/2/4"),
    Pair("rampup", "8: sharding=8/8/8", "2: sharding=2/2/2"),
]
QUICK = {PAIRS[0], PAIRS[3], PAIRS[14], PAIRS[17]}
PARAMS = [pytest.param(pair, marks=[] if pair in QUICK else [pytest.mark.slow], id=" -- ".join(pair)) for pair in PAIRS]


def train_alone(folder: Path, models: list[str]) -> None:
    """Write what one rank finds without interruption."""
    for model in models:
        run = start(folder, _settings(folder, model, "1:", f"{model}-alone"), resume="never")
        whole = run_steps(run, BEFORE + AFTER)
        after = {name: whole[name][BEFORE:] for name in ("losses", "norms", "sums")}
        facts = {"states": _states(run), "facts": _facts(run)}
        torch.save({"weights": whole["weights"], **after, **facts}, folder / f"{model}.pt")


def save_all(folder: Path, sources: list[tuple[str, str]]) -> None:
    """Train the first steps on each layout, and save."""
    for model, layout in sources:
        run = start(folder, _settings(folder, model, layout, _name(model, layout)), resume="never")
        run_steps(run, BEFORE)
        run.save()
        run.saver.finish()


def go_on(folder: Path, pairs: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], dict[str, float]]:
    """Load on each target and train on; return the errors against one rank's uninterrupted run."""
    found = {}
    for pair in pairs:
        model, source, target = pair
        out = "to " + " ".join(pair).replace("/", "-")
        run = start(folder, _settings(folder, model, target, out), resume=str(folder / _name(model, source)))
        assert run.progress.step == BEFORE
        result, truth = run_steps(run, AFTER), torch.load(folder / f"{model}.pt")
        assert _facts(run) == truth["facts"]
        found[pair] = {**errors(result, truth), "states": _state_error(_states(run), truth["states"])}
    return found


def _settings(folder: Path, model: str, layout: str, out: str) -> Mapping[str, Any]:
    rows = 1 if layout.startswith("8") else 2
    batch = {"global_sequences": BATCHES[model], "microbatch_sequences": rows}
    ours = {"out": str(folder / out), "batch": batch, "train": {"steps": BEFORE + AFTER}}
    return merged(merged(settings_of(parse_case(layout)), MODELS[model]), ours)


def _name(model: str, layout: str) -> str:
    return f"{model} {layout}".replace("/", "-")


def _facts(run: Run) -> dict[str, Any]:
    progress = {name: value for name, value in run.progress.state_dict().items() if name != "seconds"}
    return {"progress": progress, "data": run.loader.state_dict(), "spikes": run.spikes.state_dict()}


def _states(run: Run) -> dict[str, Any]:
    return optimizer_tensors(run.pieces, run.optimizers)


def _state_error(found: Mapping[str, Any], truth: Mapping[str, Any]) -> float:
    worst = 0.0
    for name, value in found.items():
        whole = truth[name]
        if isinstance(value, Rectangle):
            assert value.shape == whole.shape
            part = whole[tuple(slice(o, o + n) for o, n in zip(value.offset, value.tensor.shape, strict=True))]
            value = value.tensor
        else:
            part = whole
        if value.numel():
            worst = max(worst, float((value - part).abs().max() / whole.abs().max()))
    return worst


@pytest.fixture(scope="module")
def found(shards: Path, request: pytest.FixtureRequest) -> dict[Pair, dict[str, float]]:
    pairs = [item.callspec.params["pair"] for item in request.session.items if _reshards(item)]
    run_ranks(1, train_alone, shards, sorted({pair.model for pair in pairs}), timeout=300.0)
    for ranks, sources in _by_ranks({(pair.model, pair.source) for pair in pairs}, lambda source: source[1]):
        run_ranks(ranks, save_all, shards, sources, timeout=600.0)
    results: dict[Pair, dict[str, float]] = {}
    for ranks, targets in _by_ranks(pairs, lambda pair: pair.target):
        by_rank = run_ranks(ranks, go_on, shards, [tuple(pair) for pair in targets], timeout=600.0)
        for pair in targets:
            results[pair] = {name: max(errors[pair][name] for errors in by_rank) for name in ALLOWED}
    return results


def _reshards(item: pytest.Item) -> bool:
    # Other files have parameters of this name, too.
    return hasattr(item, "callspec") and isinstance(item.callspec.params.get("pair"), Pair)


def _by_ranks(items: Any, layout_of: Any) -> list[tuple[int, list[Any]]]:
    ranks_of = lambda item: parse_case(layout_of(item)).ranks  # noqa: E731
    every = sorted({ranks_of(item) for item in items})
    return [(ranks, sorted(item for item in items if ranks_of(item) == ranks)) for ranks in every]


@pytest.mark.parametrize("pair", PARAMS)
def test_another_layout_goes_on_as_one_rank_would(pair: Pair, found: dict[Pair, dict[str, float]]) -> None:
    assert {name: value for name, value in found[pair].items() if not value <= ALLOWED[name]} == {}
