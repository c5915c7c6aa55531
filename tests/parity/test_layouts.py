"""Every tested combination of features trains as one rank does; docs/support_matrix.md is written from what is found.

TERNLM_WRITE_MATRIX=1 pytest tests/parity/test_layouts.py -m ''
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import settings_of, train_alone, train_cases
from matrix import page, rows
from rank_steps import make_config
from ranks import run_ranks

from ternlm.config.layout import resolve_layout
from ternlm.config.support import MATRIX, TESTED, features_of, parse_case

# The greatest relative errors allowed; those of weights are of a tensor's greatest weight.
ALLOWED = {"loss": 2e-5, "norm": 2e-5, "metrics": 2e-5, "weights": 1e-5}
PAGE = Path(__file__).parents[2] / MATRIX
WRITING = bool(os.environ.get("TERNLM_WRITE_MATRIX"))

# What runs without `-m slow`: one case for each kind of code that ranks need.
QUICK = {
    "2: sharding=2/2/2",
    "2: tensor=2",
    "2: context-ring=2",
    "2: context-all_to_all=2",
    "2: pipeline-1f1b=2",
    "4: tensor-sequence=2 sharding=1/2/2",
    "4: context-all_to_all=2 sharding=1/2/4 several-rows rampup recompute-matmuls tied qk-norm rope-dynamic smoothing "
    "z-loss spike",
    "4: tensor=2 pipeline-interleaved=2 several-rows packing-pad qk-norm",
    "8: sharding=1/2/4",
    "8: tensor-sequence=2 pipeline-1f1b=2 sharding=1/2/2",
}
PARAMS = [pytest.param(text, marks=[] if text in QUICK else [pytest.mark.slow], id=text) for text in TESTED]

Errors = dict[str, float]


class Trainings:
    """Trains, once for each number of ranks, all cases that this session is to test."""

    def __init__(self, folder: Path, texts: list[str]) -> None:
        self.found: dict[str, Errors] = {}
        self._folder, self._texts, self._failures = folder, texts, dict[int, AssertionError]()

    def errors(self, text: str) -> Errors:
        """Return a case's greatest errors over its ranks."""
        ranks = parse_case(text).ranks
        if ranks in self._failures:
            raise self._failures[ranks]
        if text not in self.found:
            self._train(ranks)
        return self.found[text]

    def _train(self, ranks: int) -> None:
        texts = [text for text in self._texts if parse_case(text).ranks == ranks]
        try:
            if not self._folder.joinpath("done").exists():
                run_ranks(1, train_alone, self._folder, self._texts, timeout=600.0)
                self._folder.joinpath("done").touch()
            by_rank = run_ranks(ranks, train_cases, self._folder, texts, timeout=1200.0)
        except AssertionError as failure:
            self._failures[ranks] = failure
            raise
        for text in texts:
            self.found[text] = {name: max(errors[text][name] for errors in by_rank) for name in ALLOWED}


@pytest.fixture(scope="module")
def trainings(shards: Path, request: pytest.FixtureRequest) -> Iterator[Trainings]:
    texts = [item.callspec.params["text"] for item in request.session.items if _trains(item)]
    trainings = Trainings(shards, texts)
    yield trainings
    if WRITING:
        assert trainings.found.keys() == set(TESTED), "the page needs all cases: run with -m ''"
        PAGE.write_text(page(trainings.found), encoding="utf-8")


def _trains(item: pytest.Item) -> bool:
    return "trainings" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")


@pytest.mark.parametrize("text", PARAMS)
def test_it_trains_as_one_rank_does(text: str, trainings: Trainings) -> None:
    errors = trainings.errors(text)
    assert {name: value for name, value in errors.items() if not value <= ALLOWED[name]} == {}


@pytest.mark.skipif(WRITING, reason="the page is written when all cases are done")
def test_the_page_lists_exactly_the_cases_and_what_was_found_is_allowed() -> None:
    listed = rows(PAGE.read_text(encoding="utf-8"))
    assert [text for text, _ in listed] == list(TESTED)
    assert all(value <= ALLOWED[name] for _, errors in listed for name, value in errors.items())


@pytest.mark.parametrize("text", TESTED)
def test_a_case_has_the_features_of_its_settings(text: str, tmp_path: Path) -> None:
    case = parse_case(text)
    config = make_config(tmp_path, settings_of(case))
    assert features_of(config, resolve_layout(config, case.ranks)) == case.features


def test_what_is_quick_is_tested() -> None:
    assert set(TESTED) >= QUICK
    assert len(TESTED) == len(set(TESTED)) >= 40
