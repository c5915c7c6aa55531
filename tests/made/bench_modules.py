"""The modules of a benchmark, which are siblings on its script's own path."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest


@contextmanager
def modules_of(folder: Path, names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Give modules by name; afterwards they and their path are gone, so that another benchmark's can have theirs."""
    monkeypatch.syspath_prepend(str(folder))
    path = list(sys.path)
    yield SimpleNamespace(**{name: __import__(name) for name in names})
    sys.path[:] = path
    for name in names:
        del sys.modules[name]
