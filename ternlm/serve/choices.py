"""Answers in the two shapes of OpenAI's interface: as a stream's chunks, and whole, which is made of the chunks."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ternlm.data.tokenizer import Tokenizer
from ternlm.infer.answer import Delta, Said
from ternlm.infer.sampling import Logprobs
from ternlm.infer.text import TextStream
from ternlm.serve.errors import ApiError
from ternlm.serve.tool_calls import CallPiece, ToolCallParser, ToolFormat

_LEAST = -9999.0
"""What stands for the logarithm of 0, which JSON can't tell."""


class Choice(Protocol):
    """One of the answers to a request."""

    def take(self, delta: Delta) -> dict[str, Any] | None:
        """Go on by what is new; return it as a chunk's choice, None where nothing is to be told."""

    def whole(self) -> dict[str, Any]:
        """Return all that came, as a choice."""


class Speller:
    """Tells how single tokens look."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._pieces = tokenizer, tokenizer.pieces

    def bytes_of(self, token: int) -> bytes:
        """Return a token's bytes; a special one's are its name's."""
        if token >= len(self._pieces):
            return b""
        if token in self._tokenizer.special_ids:
            return self._tokenizer.token_of(token).encode()
        return self._pieces[token]

    def text_of(self, token: int) -> str:
        """Return a token's text; bytes that make no character are written out."""
        piece = self.bytes_of(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _value(logprob: float) -> float:
    return max(logprob, _LEAST)


class CompletionChoice:
    """A choice of /v1/completions."""

    def __init__(
        self,
        index: int,
        speller: Speller,
        *,
        logprobs: bool,
        echo: tuple[str, Sequence[int], Sequence[int]] | None = None,
        prompt_alone: bool = False,
    ) -> None:
        """echo: the prompt's text, ids and their places in the text, where it is part of the answer.

        prompt_alone: what is generated isn't told.
        """
        self._index, self._speller, self._alone = index, speller, prompt_alone
        self._echo = echo
        self._shift = len(echo[0]) if echo else 0
        self._text: list[str] = []
        self._logprobs: dict[str, list[Any]] | None = _no_logprobs() if logprobs else None
        self._finish: str | None = None

    def take(self, delta: Delta) -> dict[str, Any] | None:
        """As `Choice`."""
        text, logprobs = "", _no_logprobs()
        if self._echo:
            text, ids, places = self._echo
            known: list[Logprobs | None] = [None, *delta.prompt_logprobs]
            if self._logprobs is not None:
                for token, place, told in zip(ids, places, known, strict=False):
                    self._add(logprobs, token, place, told)
            self._echo = None
        if not self._alone:
            text += delta.text
            for each in delta.said:
                self._add(logprobs, each.token, each.place + self._shift, each.logprobs)
        self._finish = _reason(delta, alone=self._alone)
        self._text.append(text)
        if self._logprobs is not None:
            for name, values in logprobs.items():
                self._logprobs[name] += values
        if not (text or logprobs["tokens"] or self._finish):
            return None
        told_logprobs = logprobs if self._logprobs is not None else None
        return {"index": self._index, "text": text, "logprobs": told_logprobs, "finish_reason": self._finish}

    def whole(self) -> dict[str, Any]:
        """As `Choice`."""
        text, finish = "".join(self._text), self._finish
        return {"index": self._index, "text": text, "logprobs": self._logprobs, "finish_reason": finish}

    def _add(self, logprobs: dict[str, list[Any]], token: int, place: int, told: Logprobs | None) -> None:
        text_of = self._speller.text_of
        tops: dict[str, float] | None = None
        if told is not None:
            tops = {}
            for other, value in [*told.top, (token, told.token)]:
                tops.setdefault(text_of(other), _value(value))
        logprobs["tokens"].append(text_of(token))
        logprobs["token_logprobs"].append(None if told is None else _value(told.token))
        logprobs["top_logprobs"].append(tops)
        logprobs["text_offset"].append(place)


def _no_logprobs() -> dict[str, list[Any]]:
    return {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}


def places_of(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """Tell where in a prompt's text each of its tokens begins."""
    stream, places, length = TextStream(tokenizer, []), [], 0
    for token in prompt:
        places.append(length)
        length += len(stream.add([token]))
    return places


class ChatChoice:
    """A choice of /v1/chat/completions."""

    def __init__(self, index: int, speller: Speller, *, logprobs: bool, form: ToolFormat | None = None) -> None:
        """form: how calls are written, where they are looked for."""
        self._index, self._speller = index, speller
        self._parser = ToolCallParser(form) if form else None
        self._content: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[dict[str, Any]] | None = [] if logprobs else None
        self._finish: str | None = None
        self._begun = False

    def take(self, delta: Delta) -> dict[str, Any] | None:
        """As `Choice`."""
        told: dict[str, Any] = {}
        if not self._begun:
            told |= {"role": "assistant", "content": ""}
            self._begun = True
        pieces: list[str | CallPiece] = [delta.text] if delta.text else []
        if self._parser is not None:
            pieces = self._parser.add(delta.text)
            if delta.finish is not None:
                pieces += self._parser.finish()
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        if content:
            told["content"] = content
            self._content.append(content)
        calls = [self._call(piece) for piece in pieces if isinstance(piece, CallPiece)]
        if calls:
            told["tool_calls"] = calls
        self._finish = _reason(delta, calls=bool(self._calls))
        logprobs = [self._entry(each) for each in delta.said] if self._logprobs is not None else []
        if self._logprobs is not None:
            self._logprobs += logprobs
        if not (told or logprobs or self._finish):
            return None
        shown = {"content": logprobs, "refusal": None} if self._logprobs is not None else None
        return {"index": self._index, "delta": told, "logprobs": shown, "finish_reason": self._finish}

    def whole(self) -> dict[str, Any]:
        """As `Choice`."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message |= {"content": content or None, "tool_calls": list(self._calls.values())}
        logprobs = None if self._logprobs is None else {"content": self._logprobs, "refusal": None}
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": self._finish}

    def _call(self, piece: CallPiece) -> dict[str, Any]:
        if piece.name is None:
            self._calls[piece.index]["function"]["arguments"] += piece.arguments
            return {"index": piece.index, "function": {"arguments": piece.arguments}}
        call = {"id": piece.id, "type": "function"}
        self._calls[piece.index] = {**call, "function": {"name": piece.name, "arguments": piece.arguments}}
        return {"index": piece.index, **call, "function": {"name": piece.name, "arguments": piece.arguments}}

    def _entry(self, said: Said) -> dict[str, Any]:
        assert said.logprobs is not None  # they were asked for
        entry = self._spelt(said.token, said.logprobs.token)
        entry["top_logprobs"] = [self._spelt(token, value) for token, value in said.logprobs.top]
        return entry

    def _spelt(self, token: int, logprob: float) -> dict[str, Any]:
        text, piece = self._speller.text_of(token), self._speller.bytes_of(token)
        return {"token": text, "logprob": _value(logprob), "bytes": list(piece)}


def _reason(delta: Delta, *, calls: bool = False, alone: bool = False) -> str | None:
    """Return why an answer ended, as it is told; raises ApiError where a step failed."""
    if delta.finish == "error":
        raise ApiError(500, "the engine failed on this request; its log says why", code="internal_error")
    if delta.finish == "stop":
        return "length" if alone else "tool_calls" if calls else "stop"
    return delta.finish


def usage_of(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> Mapping[str, Any]:
    """Return how many tokens there were, as it is told."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
