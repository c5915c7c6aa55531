"""Tasks in worker processes: every result once, the first error, and workers that are killed."""

import os
import time
from functools import partial

import pytest

from ternlm.data.errors import DataError
from ternlm.data.workers import run_tasks

# A work function must be importable in a fresh process, which this file isn't: partial(f, x) makes one of f.
POWERS_OF_TWO = partial(partial, pow, 2)
SLEEP = partial(partial, time.sleep)
EXIT = partial(partial, os._exit)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_done_once(workers):
    results = list(run_tasks(POWERS_OF_TWO, range(20), workers))
    assert sorted(results) == [(task, 2**task) for task in range(20)]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_of_the_lowest_task_is_raised_and_no_other_begins(workers):
    done = []
    with pytest.raises(ValueError, match="non-negative"):
        for task, _ in run_tasks(SLEEP, [0, 0, -1, *[1] * 60], workers):
            done.append(task)
    # A worker may start seconds after the other, which does its tasks meanwhile: a minute of them isn't done.
    assert len(done) < 45


def test_a_worker_that_is_gone_is_an_error_with_its_exit_code():
    with pytest.raises(DataError, match=r"a worker ended by itself .exit code 7"):
        list(run_tasks(EXIT, [7, 7, 7], 2))


def test_one_worker_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    seen = [os.environ["TOKENIZERS_PARALLELISM"] for _ in run_tasks(POWERS_OF_TWO, [1, 2], 1)]
    assert seen == ["false", "false"]
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
