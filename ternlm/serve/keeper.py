"""Run a command, and end it with all that it started once the standard input closes: when who started this ends.

python keeper.py COMMAND [ARGUMENT ...]
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 10


def main(command: list[str]) -> int:
    """Return the command's exit code."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end(kind: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, kind)

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        end(signal.SIGTERM)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            end(signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's Ctrl-C reaches all: who started this decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
    code = process.wait()
    end(signal.SIGKILL)  # what it left behind
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
