"""What a layout can't do is refused on every rank, also where untested combinations are allowed."""

from pathlib import Path

import pytest
from cases import settings_of
from rank_steps import merged, start
from ranks import run_ranks

from ternlm.config import ConfigError
from ternlm.config.support import parse_case

REFUSED = {
    "recompute": {"compute": {"recompute": 1.0}},
    "compile=off": {"compute": {"compile": "on"}},
    "multiple of parallel.pipeline = 2": {"batch": {"global_sequences": 15}, "train": {"steps": 1}},
}


def messages(folder: Path) -> dict[str, str]:
    """Return what the set-up of each refused run says."""
    found = {}
    for name, changes in REFUSED.items():
        settings = merged(settings_of(parse_case("2: pipeline-zero_bubble=2")), changes)
        try:
            start(folder, settings, resume="never")
            found[name] = "started"
        except ConfigError as refusal:
            found[name] = str(refusal)
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_schedule_cannot_run_is_refused_with_the_remedy(rank: int, refusals: list[dict[str, str]]) -> None:
    for name, message in refusals[rank].items():
        assert name in message


@pytest.fixture(scope="module")
def refusals(shards: Path) -> list[dict[str, str]]:
    return run_ranks(2, messages, shards)
