"""The verb `tern web`: the chat page, and beside it a server of its own where it is given a model."""

import contextlib
import logging
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from ternlm.cli.client import ApiKey
from ternlm.cli.options import Base, Device, Dtype

_DEFAULT_URL = "http://127.0.0.1:8000"
_END_SECONDS = 20.0
"""Time that processes have to end."""


def web(
    model: Annotated[
        str | None,
        typer.Argument(help="A model to serve beside the page, as `tern serve` takes it.", show_default="a server's"),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Of a server with OpenAI's interface.", show_default=_DEFAULT_URL),
    ] = None,
    port: Annotated[int, typer.Option(help="Of the page; 0: any that is free.", min=0, max=65535)] = 8501,
    api_key: ApiKey = None,
    history: Annotated[
        Path | None, typer.Option(help="Folder to keep conversations in.", show_default="as long as the page is open")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    base: Base = None,
    protocol: Annotated[
        Literal["internlm", "internlm2", "chatml", "llama3"] | None,
        typer.Option(help="How the model was trained to chat.", show_default="the model's own"),
    ] = None,
) -> None:
    """Talk with a model in the browser. The page is for this machine alone; Ctrl-C ends it, and its server."""
    from ternlm.config.section import ConfigError

    missing = [name for name in ("streamlit", "httpx") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"tern web needs {' and '.join(missing)}; pip install 'ternlm[web]'")
    if model is not None and url is not None:
        raise ConfigError(f"--url {url} is of a server, and the model {model} is to be served; give one of them")
    from ternlm.web.run import free_port

    try:
        port = free_port(port)
    except OSError as error:
        raise ConfigError(f"--port {port} can't be used ({error.strerror}); choose another, or 0 for any") from error
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request, else
    words = ["--device", device, "--dtype", dtype]
    for name, value in (("--base", base), ("--protocol", protocol)):
        words += [name, value] if value is not None else []
    with _told_to_end() as is_over, contextlib.ExitStack() as running:
        if model is not None:
            url = running.enter_context(_server(model, words, api_key, is_over))
        if url is not None or model is None:
            _run_page(url or _DEFAULT_URL, port, api_key, history, is_over)


@contextlib.contextmanager
def _told_to_end() -> Iterator[Callable[[], bool]]:
    """Give what says whether a signal has told this process to end, as long as the context lasts."""
    told: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: told.append(number)) for number in numbers]
    try:
        yield lambda: bool(told)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _server(model: str, words: list[str], api_key: str | None, is_over: Callable[[], bool]) -> Iterator[str | None]:
    """Run `tern serve` and give its URL once it is healthy; None where it was told to end before."""
    from ternlm.config.section import ConfigError

    environment = dict(os.environ)
    if api_key:
        environment["TERNLM_API_KEY"] = api_key
    command = [sys.executable, "-m", "ternlm", "serve", model, *words, "--port", "0", "--grace", "0"]
    with _process(command, environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = b""
        while not is_over() and not line.endswith(b"\n"):
            if select.select([process.stdout], [], [], 0.2)[0]:
                part = os.read(process.stdout.fileno(), 4096)
                if not part:
                    raise ConfigError(f"tern serve {model} didn't start, for the reason above")
                line += part
        text = line.decode(errors="replace").strip()
        found = re.search(r"(http://\S+)/v1 serves", text)
        if found is None and not is_over():
            raise ConfigError(f"tern serve {model} says {text!r}, and not where it serves")
        typer.echo(text)
        while found is not None and not is_over() and not _is_healthy(found[1]):
            if process.poll() is not None:
                raise ConfigError(f"tern serve {model} ended with {process.returncode}, for the reason above")
            time.sleep(0.2)
        yield None if found is None or is_over() else found[1]


def _is_healthy(url: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _run_page(url: str, port: int, api_key: str | None, history: Path | None, is_over: Callable[[], bool]) -> None:
    """Run the page until it ends or is told to."""
    from ternlm.config.section import ConfigError
    from ternlm.web.api import Server, ServerError
    from ternlm.web.run import HOST, command, environment, is_up

    try:
        Server(url)
    except ServerError as error:
        raise ConfigError(f"--url: {error}") from error
    with _process(command(port), environment(url, api_key, history, os.environ), stdout=subprocess.DEVNULL) as page:
        is_told = False
        while not is_over() and page.poll() is None:
            if not is_told and is_up(port):
                typer.echo(f"http://{HOST}:{port} is the page; Ctrl-C ends it")
                sys.stdout.flush()  # who started this in a pipe waits for it
                is_told = True
            time.sleep(0.2)
        if page.poll() is not None and not is_over():
            raise ConfigError(f"the page ended with {page.returncode}, for the reason above")


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str], stdout: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that ends with the context; Ctrl-C in the terminal reaches this process alone."""
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()
