"""Runs numbered tasks in worker processes that die with their parent; results come back as they are done.

A worker is a fresh process (spawned), so callers that have threads or a GPU are safe.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from ternlm.data.errors import DataError

Result = TypeVar("Result")


def run_tasks(
    make_work: Callable[[], Callable[[int], Result]], tasks: Sequence[int], workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield (task, work(task)) as tasks end, in any order; each worker calls make_work() once, to get `work`.

    After an error in a task no other begins, and the error of the lowest task is raised. `make_work` must be
    picklable. One worker runs in this process.
    """
    if workers <= 1 or len(tasks) <= 1:
        with _one_thread():
            work = make_work()
            for task in tasks:
                yield task, work(task)
        return
    context = multiprocessing.get_context("spawn")
    links: dict[Connection, Any] = {}
    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make_work))
            process.start()
            theirs.close()
            links[ours] = process
        yield from _distribute(links, list(tasks))
    finally:
        for link, process in links.items():
            link.close()
            process.terminate()
            process.join()


def _distribute(links: dict[Connection, Any], tasks: list[int]) -> Iterator[tuple[int, Any]]:
    """Hand out the tasks in order, one at a time to each worker, and yield what comes back."""
    waiting = tasks[::-1]
    running: dict[Connection, int] = {}
    failed: dict[int, Exception] = {}
    for link in links:
        _give(link, waiting, running)
    while running:
        for ready in wait(list(running)):
            link = next(link for link in running if link is ready)
            task = running.pop(link)
            try:
                result, error = link.recv()
            except (EOFError, ConnectionError) as ended:
                links[link].join(1)
                raise DataError(
                    f"a worker ended by itself (exit code {links[link].exitcode}; -9 is often a lack of "
                    "memory: use fewer workers). A script must call this under if __name__ == '__main__':"
                ) from ended
            if error is not None:
                failed[task] = error
                waiting.clear()
            else:
                yield task, result
                _give(link, waiting, running)
    if failed:
        raise failed[min(failed)]


def _give(link: Connection, waiting: list[int], running: dict[Connection, int]) -> None:
    if not waiting:
        return
    running[link] = task = waiting.pop()
    with contextlib.suppress(BrokenPipeError):  # where the worker is gone, recv says so
        link.send(task)


def _serve(link: Connection, make_work: Callable[[], Callable[[int], Any]]) -> None:
    """Work in a process of its own until the parent is gone or has no more tasks."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    with _one_thread():
        work = make_work()
        while True:
            try:
                task = link.recv()
            except EOFError:
                return
            try:
                link.send((work(task), None))
            except Exception as error:
                if not isinstance(error, DataError):
                    error.add_note(traceback.format_exc())
                link.send((None, error))


def _die_with_parent() -> None:
    """End this process when the parent is gone, even by kill -9: another run may be about to do its work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the library tokenizers to one thread: there are as many workers as cores to use."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
