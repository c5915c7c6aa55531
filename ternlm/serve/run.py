"""A server from its settings to its end: the port, the signals, and what runs when they come."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import uvicorn

from ternlm.config.section import UserError
from ternlm.serve.address import url_of
from ternlm.serve.guard import Gate

logger = logging.getLogger(__name__)

_LAST_ANSWERS_SECONDS = 5
"""Time for answers that have ended to reach their clients."""


class Ends(Protocol):
    """What a server ends with."""

    async def close(self, seconds: float) -> None:
        """As `Backend`; may be called again, with less time, while it works."""


def run(
    app: Any, backend: Ends, gate: Gate, bound: socket.socket, grace: float, announce: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM comes, then let what runs go on for `grace` seconds at most.

    announce: called with the URL once requests are served. A second signal ends what runs at once. Raises UserError
    where another has opened the port since it was taken.
    """
    asyncio.run(_run(app, backend, gate, bound, grace, announce))


async def _run(
    app: Any, backend: Ends, gate: Gate, bound: socket.socket, grace: float, announce: Callable[[str], None]
) -> None:
    url, loop = url_of(bound), asyncio.get_running_loop()
    told, again = asyncio.Event(), asyncio.Event()

    def hear() -> None:
        (again if told.is_set() else told).set()
        server.force_exit = server.should_exit  # once all has been cut there is nothing more to wait for

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, hear)
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
    )
    server = _Server(settings)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    if server.started and not told.is_set():
        announce(url)
    await _first({serving, asyncio.create_task(told.wait())})
    gate.is_open = False
    logger.info("ending: new requests are refused, what runs has %g s", grace)
    closing = asyncio.create_task(backend.close(grace))
    await _first({closing, asyncio.create_task(again.wait())})
    if not closing.done():
        await backend.close(0.0)
    await closing
    server.should_exit = True
    try:
        await serving
    except OSError as error:  # two may have taken a port while neither was open
        raise UserError(f"{url} can't be opened ({error.strerror}); choose another --port") from error


class _Server(uvicorn.Server):
    """One that leaves signals to whoever runs it: its own handlers would close the port at once."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _first(tasks: set[asyncio.Task[Any]]) -> None:
    """Wait for one of the tasks; those that wait for a signal are given up."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
