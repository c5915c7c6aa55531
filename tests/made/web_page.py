"""`tern web` for tests, in a process of its own."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from served import ROOT


@contextmanager
def tern_web(*words: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run `tern web`; give it, and the URLs that it told, the page's last."""
    command = [sys.executable, "-m", "ternlm", "web", *words, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    end, text = time.monotonic() + 180, ""
    try:
        while "is the page" not in text:
            ready = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]
            part = os.read(process.stdout.fileno(), 4096).decode() if ready else ""
            if not part:
                process.kill()
                pytest.fail(f"no page: {text} {process.communicate()[1]}")
            text += part
        yield process, re.findall(r"http://[^/\s]+", text)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def is_there(url: str) -> bool:
    """Whether somebody listens at a URL."""
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as tried:
        return tried.connect_ex((host, int(port))) == 0
