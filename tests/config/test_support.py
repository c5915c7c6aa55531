from typing import Any

import pytest

from ternlm.config import Config, ConfigError, config_from_dict, support
from ternlm.config.layout import resolve_layout
from ternlm.config.support import AXES, TESTED, features_of, nearest_case, parse_case, untested_pairs


def config(**sections: Any) -> Config:
    return config_from_dict(
        {
            "model": {"preset": "internlm-7b"},
            "data": {"sources": [{"name": "en", "path": "tokens/en"}]},
            "batch": {"global_sequences": 1024},
            "train": {"steps": 10},
            **sections,
        }
    )


def test_degrees_and_group_sizes_are_no_features_of_their_own() -> None:
    small = config(parallel={"tensor": 2}, sharding={"params": 1, "grads": 2, "optimizer": 2})
    large = config(parallel={"tensor": 8}, sharding={"params": 1, "grads": 8, "optimizer": 64})
    features = features_of(small, resolve_layout(small, 8))
    assert features == {"tensor-sequence", "sharding-1/k", "copies", "data", "compile"}
    assert features_of(large, resolve_layout(large, 1024)) == features | {"wider-states"}


def test_the_layouts_that_people_use_are_tested() -> None:
    for parallel, sharding in (
        ({}, {"params": 1, "grads": 1, "optimizer": 8}),
        ({}, {"params": -1, "grads": -1, "optimizer": -1}),
        ({"tensor": 4, "pipeline": 4}, {"params": 1, "grads": 1, "optimizer": -1}),
        ({"context": 8}, {"params": 8, "grads": 8, "optimizer": -1}),
    ):
        resolve_layout(config(parallel=parallel, sharding=sharding, compute={"recompute": 1.0}), 1024)


def test_an_untested_pair_is_refused_by_name_with_the_nearest_tested_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        support, "TESTED", ("8: tensor-sequence=2 sharding=2/2/2", "4: sharding=1/1/2 compile", "2: tied")
    )
    sections = {"parallel": {"tensor": 2}, "sharding": {"params": 2, "grads": 2, "optimizer": 2}}
    with pytest.raises(
        ConfigError, match=r"no test trains compile with sharding-k/k; compile with tensor-sequence,"
    ) as e:
        resolve_layout(config(**sections), 8)
    assert "`8: tensor-sequence=2 sharding=2/2/2`" in str(e.value)
    sections["parallel"] |= {"allow_untested": True}
    resolve_layout(config(**sections), 8)


def test_one_rank_needs_no_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "TESTED", ())
    resolve_layout(config(), 1)


def test_what_no_case_has_is_named_alone() -> None:
    tested = ("2: tied", "2: sharding=1/1/2 muon")
    assert untested_pairs({"tied", "muon", "compile"}, tested) == [("compile", "compile"), ("muon", "tied")]


def test_the_nearest_case_has_most_of_the_features_and_least_else() -> None:
    wanted = parse_case("16: tensor-sequence=2 pipeline-1f1b=2 sharding=1/4/4").features
    assert nearest_case(wanted).text == "8: tensor-sequence=2 pipeline-1f1b=2 sharding=1/2/2"


def test_every_pair_of_features_that_can_meet_is_tested() -> None:
    every = set().union(*(parse_case(text).features for text in TESTED))
    # Refused by their own rules: a pipeline's ends hold embedding and head; zero-bubble splits a block's backward.
    impossible = {
        *((pipeline, "tied") for pipeline in every if pipeline.startswith("pipeline")),
        *(
            (pipeline, other)
            for pipeline in ("pipeline-zero_bubble", "pipeline-zero_bubble_v")
            for other in ("compile", "recompute", "recompute-matmuls", "sharding-1/k", "sharding-k/k", "wider-states")
        ),
        ("adapter", "muon"),  # Muon is for whole matrices
        ("sharding-1/1/1", "copies"),
        ("sharding-1/1/1", "wider-states"),
        ("sharding-1/1/k", "wider-states"),
    }
    missing = {frozenset(pair) for pair in untested_pairs(every) if not any(axis.issuperset(pair) for axis in AXES)}
    assert missing == {frozenset(pair) for pair in impossible}
