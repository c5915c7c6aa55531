"""The sections' own arithmetic: batch ramp-up, skipped steps, parameter counts of the presets."""

import pytest

from ternlm.config import (
    PRESETS,
    BatchConfig,
    DataConfig,
    ModelConfig,
    RampupConfig,
    ScheduleConfig,
    SourceConfig,
)

SOURCE = SourceConfig(name="en", path="data/en")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_model(preset: str) -> None:
    assert ModelConfig(preset=preset).num_params > 0


@pytest.mark.parametrize(
    ("preset", "params"),
    [("internlm-7b", 7_321_948_160), ("internlm-7b-8k", 7_321_948_160), ("internlm-20b", 20_089_943_040)],
)
def test_presets_count_the_ancestors_parameters(preset: str, params: int) -> None:
    assert ModelConfig(preset=preset).num_params == params


def test_tied_embeddings_count_once() -> None:
    untied = ModelConfig(preset="tiny")
    tied = ModelConfig(preset="tiny", tie_word_embeddings=True)
    assert untied.num_params - tied.num_params == 512 * 64


def test_the_batch_grows_to_its_full_size() -> None:
    batch = BatchConfig(global_sequences=20, rampup=RampupConfig(start=8, increment=8, every=2))
    assert [batch.sequences_at(step) for step in range(6)] == [8, 8, 16, 16, 20, 20]


@pytest.mark.parametrize(
    ("start", "increment", "told"),
    [(32, 8, "rampup.start = 32 must be at most"), (6, 8, "rampup.start = 6 must be a multiple"),
     (8, 6, "rampup.increment = 6 must be a multiple")],
)  # fmt: skip
def test_a_ramp_that_does_not_fit_is_refused(start: int, increment: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        BatchConfig(
            global_sequences=16,
            microbatch_sequences=4,
            rampup=RampupConfig(start=start, increment=increment, every=2),
        )


def test_skipped_steps_are_inclusive_ranges() -> None:
    data = DataConfig(sources=(SOURCE,), skip_steps="3-5,9")
    assert [step for step in range(12) if data.skipped(step)] == [3, 4, 5, 9]
    assert not DataConfig(sources=(SOURCE,)).skipped(0)


def test_weights_are_given_to_all_sources_or_none() -> None:
    weighted = SourceConfig(name="cn", path="data/cn", weight=2)
    with pytest.raises(ValueError, match="'en' has no weight"):
        DataConfig(sources=(weighted, SOURCE))


def test_warmup_and_decay_must_fit_in_the_run() -> None:
    with pytest.raises(ValueError, match="must not exceed 1 together"):
        ScheduleConfig(kind="wsd", warmup_fraction=0.5, decay_fraction=0.6)
    assert ScheduleConfig(kind="cosine", warmup_fraction=0.9).kind == "cosine"
