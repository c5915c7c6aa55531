"""One server over a tiny model for the page and its client."""

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from served import Served, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    with serving() as running:
        yield running
