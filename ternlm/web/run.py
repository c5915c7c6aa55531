"""The page's process: Streamlit over page.py, on this machine alone, without what it would send or fetch elsewhere."""

import errno
import os
import socket
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

URL, KEY, HISTORY = "TERNLM_WEB_URL", "TERNLM_WEB_KEY", "TERNLM_WEB_HISTORY"
"""What the page reads of its environment."""
HOST, USUAL_URL = "127.0.0.1", "http://127.0.0.1:8000"


def command(port: int) -> list[str]:
    """Return the command that serves the page."""
    settings = {
        "server.address": HOST,
        "server.port": str(port),
        "server.headless": "true",
        "server.showEmailPrompt": "false",
        "server.fileWatcherType": "none",
        "server.maxUploadSize": "32",
        "browser.gatherUsageStats": "false",
        "browser.serverAddress": HOST,
        "client.toolbarMode": "minimal",
        "client.showErrorLinks": "false",
        "logger.level": "warning",
        "theme.light.primaryColor": "#2b6cb0",  # for each, so that the page is as dark as its reader's others
        "theme.dark.primaryColor": "#63a4e8",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    for host in (HOST, "localhost"):  # keeps away pages of other sites, whose names were made to lead here
        words += ["--server.allowedHosts", host]
    return [sys.executable, "-m", "streamlit", "run", str(files("ternlm.web").joinpath("page.py")), *words]


def environment(url: str, api_key: str | None, history: Path | None, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the page: `given`, with what it is to talk to. A key isn't for command lines."""
    told = {URL: url, KEY: api_key, HISTORY: str(history.resolve()) if history else None}
    kept = {name: value for name, value in given.items() if name not in told}
    return {**kept, **{name: value for name, value in told.items() if value}}


def free_port(wanted: int) -> int:
    """Return a port of this machine: the wanted one, or any that is free for 0. Raises OSError where it is taken."""
    with socket.socket() as tried:
        if os.name == "posix":
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind((HOST, wanted))
        return int(tried.getsockname()[1])


def is_up(port: int) -> bool:
    """Whether somebody listens at a port of this machine."""
    with socket.socket() as tried:
        return tried.connect_ex((HOST, port)) in (0, errno.EISCONN)
