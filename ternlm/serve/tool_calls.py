"""Calls of tools in what a model says, as it says it: text in by pieces, content and calls out by pieces.

Each family of models writes calls in a way of its own, by which its protocol's template renders them, too. A call's
arguments are told as they come, once its name is known; what turns out to be no call is content.
"""

import json
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from ternlm.data.tokenizer import Tokenizer

_BLANKS = " \t\r\n"
_CLOSERS = _BLANKS + "};"


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes a call."""

    begin: str
    """What stands before a call's JSON; nothing: an answer that begins with the JSON is a call."""
    end: str
    arguments: Literal["arguments", "parameters"]
    """What the JSON calls them."""
    begun_by: str = ""
    """What may stand before the JSON where `begin` is nothing."""

    def marks(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """List the special tokens that the format is written with."""
        written = (token for part in (self.begin, self.end, self.begun_by) for token in tokenizer.markup_in(part))
        return tuple(sorted({tokenizer.id_of(token) for token in written} & tokenizer.special_ids))


HERMES = ToolFormat("<tool_call>", "</tool_call>", "arguments")
INTERNLM2 = ToolFormat("<|action_start|><|plugin|>", "<|action_end|>", "parameters")
LLAMA3 = ToolFormat("", "", "parameters", begun_by="<|python_tag|>")


def format_of(template: str) -> ToolFormat | None:
    """Tell from a chat template how its models write calls."""
    if INTERNLM2.begin in template:
        return INTERNLM2
    if HERMES.begin in template:
        return HERMES
    if "ipython" in template and '"parameters"' in template:
        return LLAMA3
    return None


@dataclass(frozen=True)
class CallPiece:
    """What is new of a call."""

    index: int
    id: str
    name: str | None
    """In a call's first piece."""
    arguments: str
    """Text that goes on the JSON of the arguments."""


class ToolCallParser:
    """Takes what a model says, gives content (str) and pieces of calls."""

    def __init__(self, form: ToolFormat) -> None:
        self._form, self._text = form, ""
        self._state: Literal["start", "content", "head", "whole", "arguments", "tail"] = "start"
        self._json = _ObjectEnd()
        self._id = ""
        self.num_calls = 0

    def add(self, text: str) -> list[str | CallPiece]:
        """Go on by a piece of text; return what is settled."""
        self._text += text
        told: list[str | CallPiece] = []
        steps = {
            "start": self._start,
            "content": self._content,
            "head": self._head,
            "whole": self._whole,
            "arguments": self._arguments,
            "tail": self._tail,
        }
        while steps[self._state](told):
            pass
        return told

    def finish(self) -> list[str | CallPiece]:
        """Return what was held back, at the end of the answer."""
        text, self._text = self._text, ""
        if self._state in ("head", "whole"):
            whole = None if self._form.begin else self._call_in(text)
            return [*whole] if whole else [self._form.begin + text]
        if self._state == "tail" or (self.num_calls and not text.strip()):
            return []
        return [text] if text else []

    def _start(self, told: list[str | CallPiece]) -> bool:
        """See whether the answer begins with a call without marks."""
        form = self._form
        if form.begin:
            self._state = "content"
            return True
        text = self._text.lstrip(_BLANKS)
        if form.begun_by and text.startswith(form.begun_by):
            text = text[len(form.begun_by) :].lstrip(_BLANKS)
        elif not text or (form.begun_by and form.begun_by.startswith(text)):
            return False
        if text.startswith("{"):
            self._text, self._state = text, "head"
            return True
        if text:
            self._state = "content"
        return bool(text)

    def _content(self, told: list[str | CallPiece]) -> bool:
        begin, text = self._form.begin, self._text
        place = text.find(begin) if begin else -1
        if place >= 0:
            self._tell(told, text[:place])
            self._text, self._state = text[place + len(begin) :], "head"
            return True
        if self.num_calls and not text.strip():
            return False  # blanks between calls
        sizes = range(min(len(begin) - 1, len(text)), 0, -1)
        held = next((size for size in sizes if text.endswith(begin[:size])), 0)
        self._tell(told, text[: len(text) - held])
        self._text = text[len(text) - held :]
        return False

    def _tell(self, told: list[str | CallPiece], text: str) -> None:
        if text and not (self.num_calls and not text.strip()):
            told.append(text)

    def _head(self, told: list[str | CallPiece]) -> bool:
        head = _read_head(self._text, self._form.arguments)
        if head is None:
            return False
        if head is False:
            self._state = "whole"
            return True
        name, place = head
        self._id = f"call_{secrets.token_hex(12)}"
        told.append(CallPiece(self.num_calls, self._id, name, ""))
        self.num_calls += 1
        self._json, self._text, self._state = _ObjectEnd(), self._text[place:], "arguments"
        return True

    def _whole(self, told: list[str | CallPiece]) -> bool:
        """Wait for the end of a call that isn't written in the usual order."""
        begin, end = self._form.begin, self._form.end
        if not begin:
            return False
        place = self._text.find(end)
        if place < 0:
            return False
        body, self._text = self._text[:place], self._text[place + len(end) :]
        told += self._call_in(body) or [begin + body + end]
        self._state = "content"
        return True

    def _call_in(self, text: str) -> list[CallPiece] | None:
        """Read a call from the whole of its JSON; None: it isn't one."""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            return None
        arguments: Any = next((call[key] for key in ("arguments", "parameters") if key in call), None)
        if arguments is None:
            if not self._form.begin:
                return None
            arguments = {}
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self.num_calls += 1
        return [CallPiece(self.num_calls - 1, f"call_{secrets.token_hex(12)}", call["name"], arguments)]

    def _arguments(self, told: list[str | CallPiece]) -> bool:
        size = self._json.find(self._text)
        text, self._text = self._text[:size], self._text[size:]
        if text:
            told.append(CallPiece(self.num_calls - 1, self._id, None, text))
        if self._json.ended:
            self._state = "tail"
        return self._json.ended

    def _tail(self, told: list[str | CallPiece]) -> bool:
        """Pass over what closes a call."""
        end = self._form.end
        if end:
            place = self._text.find(end)
            if place < 0:
                self._text = self._text[-(len(end) - 1) :]
                return False
            self._text, self._state = self._text[place + len(end) :], "content"
            return True
        self._text = self._text.lstrip(_CLOSERS)
        if not self._text:
            return False
        self._state = "head" if self._text.startswith("{") else "content"
        return True


class _ObjectEnd:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self.ended = False
        self._depth, self._in_string, self._escaped = 0, False, False

    def find(self, text: str) -> int:
        """Return how many of the characters belong to the object."""
        for place, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return place + 1
        return len(text)


def _read_head(text: str, arguments: str) -> tuple[str, int] | Literal[False] | None:
    """Read `{"name": NAME, "arguments": ` before an object: the name and where the object begins.

    None: more must come before one can tell. False: it doesn't begin so.
    """
    place, name = 0, ""
    for wanted in ("{", '"name"', ":", None, ",", f'"{arguments}"', ":", "{"):
        while place < len(text) and text[place] in _BLANKS:
            place += 1
        if place == len(text):
            return None
        if wanted is None:
            try:
                name, place = json.JSONDecoder().raw_decode(text, place)
            except ValueError:
                return None if text[place] == '"' and not _closed_string(text, place) else False
            if not isinstance(name, str) or not name:
                return False
        elif text.startswith(wanted, place):
            place += len(wanted)
        else:
            return None if wanted.startswith(text[place:]) else False
    return name, place - 1


def _closed_string(text: str, place: int) -> bool:
    """Whether the JSON string that begins there ends."""
    escaped = False
    for character in text[place + 1 :]:
        if character == '"' and not escaped:
            return True
        escaped = character == "\\" and not escaped
    return False
