"""An answer on its way, in a thread of its own: the page looks at it now and then, and may be drawn anew meanwhile."""

import threading
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from ternlm.web.api import Answer, CallPiece, Piece, ServerError

_MOST_CALLS = 128


@dataclass
class Progress:
    """What has come of an answer."""

    text: str = ""
    thought: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    usage: Mapping[str, Any] | None = None
    num_pieces: int = 0
    seconds_to_first: float | None = None
    seconds: float = 0.0
    error: ServerError | None = None
    is_stopped: bool = False
    is_done: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to keep."""
        return not (self.text or self.thought or self.calls)

    def message(self) -> dict[str, Any]:
        """Return it as a message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thought:
            message["reasoning_content"] = self.thought
        if self.calls:
            message["tool_calls"] = deepcopy(self.calls)
        return message

    def note(self) -> dict[str, Any]:
        """Return what the page tells under it."""
        finish = "error" if self.error else "stopped" if self.is_stopped else self.finish
        note = {"finish": finish, "pieces": self.num_pieces, "seconds": self.seconds}
        return {**note, "seconds_to_first": self.seconds_to_first, "usage": dict(self.usage) if self.usage else None}


class Answering:
    """Takes an answer's pieces as they come."""

    def __init__(self, answer: Answer, on_end: Callable[[Progress], None], patience: float = 180.0) -> None:
        """on_end: called from the thread, once. patience: seconds without anybody looking, after which it stops."""
        self._answer, self._on_end, self._patience = answer, on_end, patience
        self._progress, self._lock = Progress(), threading.Lock()
        self._began = self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def look(self) -> Progress:
        """Return what has come so far."""
        with self._lock:
            self._looked = time.monotonic()
            if not self._progress.is_done:
                self._progress.seconds = self._looked - self._began
            return _copy(self._progress)

    def stop(self) -> None:
        """End the answer, here and on the server."""
        with self._lock:
            self._progress.is_stopped = not self._progress.is_done
        self._answer.close()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the end."""
        self._thread.join(seconds)

    def _run(self) -> None:
        error: ServerError | None = None
        try:
            for piece in self._answer:
                self._take(piece)
                if time.monotonic() - self._looked > self._patience:
                    self.stop()
        except ServerError as trouble:
            error = trouble
        except Exception as trouble:  # of our own making: the page is to say so rather than wait
            error = ServerError("broken", f"{type(trouble).__name__}: {trouble}")
        with self._lock:
            self._progress.seconds = time.monotonic() - self._began
            self._progress.error = error
            ended = _copy(self._progress)
        try:
            self._on_end(ended)
        finally:
            with self._lock:
                self._progress.is_done = True

    def _take(self, piece: Piece) -> None:
        with self._lock:
            its = self._progress
            if piece.text or piece.thought or piece.calls:
                its.num_pieces += 1
                if its.seconds_to_first is None:
                    its.seconds_to_first = time.monotonic() - self._began
            its.text = _whole(its.text + piece.text)
            its.thought = _whole(its.thought + piece.thought)
            for call in piece.calls:
                _add_call(its.calls, call)
            its.finish = piece.finish or its.finish
            its.usage = piece.usage or its.usage


def _copy(progress: Progress) -> Progress:
    """Return what may be shown: no half of a character at the end."""
    text, thought = (text.encode("utf-8", "replace").decode() for text in (progress.text, progress.thought))
    return replace(progress, text=text, thought=thought, calls=deepcopy(progress.calls))


def _add_call(calls: list[dict[str, Any]], piece: CallPiece) -> None:
    """Go on with a call, or begin one."""
    if not 0 <= piece.index < _MOST_CALLS:
        raise ValueError(f"a call of a tool has the index {piece.index}")
    while len(calls) <= piece.index:
        function = {"name": "", "arguments": ""}
        calls.append({"id": f"call_{len(calls)}", "type": "function", "function": function})
    call = calls[piece.index]
    call["id"] = piece.id or call["id"]
    call["function"]["name"] += _whole(piece.name)
    call["function"]["arguments"] = _whole(call["function"]["arguments"] + piece.arguments)


def _whole(text: str) -> str:
    """Join halves of characters that came apart; a half alone becomes a question mark, but for the last."""
    if text.isascii():
        return text
    last = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
    body = text[: len(text) - len(last)]
    return body.encode("utf-16", "surrogatepass").decode("utf-16", "replace") + last
