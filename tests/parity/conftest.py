import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "parallel")]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with prepared data."""
    from rank_steps import write_shards

    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder
