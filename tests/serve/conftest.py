"""One server over a tiny model for all tests that don't change it."""

from collections.abc import Iterator

import httpx
import pytest

pytest.importorskip("fastapi")

from served import Served, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client
