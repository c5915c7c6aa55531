"""One conversation to training samples: ids, and which of them are trained: what inference would have to say.

Between `conversations` and the shards. An answer's prompt is, id for id, what inference sends before that answer.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternlm.data.chat import Message, Tool, encode_chat, encode_rendered, render
from ternlm.data.conversations import Conversation, NoAnswer
from ternlm.data.errors import DataError
from ternlm.data.tokenizer import Tokenizer
from ternlm.data.typed import PlainText

_SHOWN = 40  # characters of two texts where they part


@dataclass(frozen=True)
class Sample:
    """Tokens to train on."""

    ids: list[int]
    trained: NDArray[np.bool_]
    """Per token whether it carries loss as a target."""


def encode_turns(
    tokenizer: Tokenizer,
    template: str,
    conversation: Conversation,
    *,
    stop: Collection[str],
    after_end: bool = False,
    document_end: bool = False,
    system: str | None = None,
) -> list[Sample]:
    """Encode a conversation for training.

    It is one sample if what inference sends before each trained answer is a beginning of it, token for token; else one
    sample per trained answer, each as at inference. Of an answer are trained its tokens up to and with the first of
    `stop`, which end answers; what the template puts behind it only with after_end. document_end: samples end with the
    tokenizer's eos, trained. system: the system message of a conversation that has none.
    Raises DataError where the template can't take the conversation, or can't be trained on it.
    """
    messages: list[dict[str, Any]] = conversation.messages
    if system is not None and not (messages and messages[0]["role"] == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    talk = _Talk(tokenizer, template, messages, conversation.tools)
    if not talk.turns:
        raise NoAnswer("has no answer to train on")
    ends = frozenset(tokenizer.id_of(token) for token in stop)
    found = talk.in_one() or [talk.alone(turn) for turn in talk.turns]
    eos = [tokenizer.eos_id] if document_end and tokenizer.eos_id is not None else []
    samples = []
    for ids, spans in found:
        trained = np.zeros(len(ids) + len(eos), dtype=bool)
        for number, first, last in spans:
            end = last if after_end else _answer_end(tokenizer, ids, first, last, ends)
            if end == first:
                raise NoAnswer(f"the chat template says nothing of message {number}, so there is no answer to train on")
            trained[first:end] = True
        trained[len(ids) :] = True
        samples.append(Sample([*ids, *eos], trained))
    return samples


def template_is_prefix(tokenizer: Tokenizer, template: str, conversation: Conversation) -> bool:
    """Say whether a conversation is one sample by its template."""
    return _Talk(tokenizer, template, conversation.messages, conversation.tools).in_one() is not None


def _answer_end(tokenizer: Tokenizer, ids: Sequence[int], first: int, last: int, stop: Collection[int]) -> int:
    """Find where an answer ends among ids[first:last]: after its end token, or else after its last visible token."""
    for place in range(first, last):
        if ids[place] in stop:
            return place + 1
    while last > first and not tokenizer.decode([ids[last - 1]], skip_special=False).strip():
        last -= 1
    return last


@dataclass(frozen=True)
class _Turn:
    """An answer to train on: the text that inference sends before it, and the text with it."""

    number: int
    prompt: str
    text: str


_Spans = list[tuple[int, int, int]]
"""Per answer its message's number, and where it begins and ends among ids."""


class _Talk:
    """A conversation with its template and tokenizer."""

    def __init__(
        self, tokenizer: Tokenizer, template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] | None
    ) -> None:
        self._tokenizer, self._template, self._tools = tokenizer, template, tools
        self._trained = [number for number, message in enumerate(messages) if message.get("loss")]
        self._messages: list[Message] = [
            {name: value for name, value in message.items() if name != "loss"} for message in messages
        ]

    @cached_property
    def turns(self) -> list[_Turn]:
        """The answers to train on, in order."""
        return [self._turn(number) for number in self._trained]

    def in_one(self) -> tuple[tuple[list[int], _Spans]] | None:
        """Return the ids up to the last trained answer; None if an answer's prompt or text isn't a beginning of it."""
        last = self.turns[-1]
        if not all(last.text.startswith(turn.prompt) and last.text.startswith(turn.text) for turn in self.turns):
            return None
        encoded = _Encoded(self, last)
        spans: _Spans = []
        for turn in self.turns:
            first = encoded.count(turn.number, turn.prompt, True)
            if first is None:
                return None
            end = len(encoded.ids) if turn is last else encoded.count(turn.number + 1, turn.text, False)
            if end is None:
                return None
            spans.append((turn.number, first, end))
        return ((encoded.ids, spans),)

    def alone(self, turn: _Turn) -> tuple[list[int], _Spans]:
        """Return the ids of one answer behind its prompt."""
        encoded = _Encoded(self, turn)
        ids, first = encoded.ids, encoded.count(turn.number, turn.prompt, True)
        if first is None:  # a token straddles prompt and answer
            prompt = self.encode(turn.number, True)
            ids, first = prompt + self._answer(turn), len(prompt)
            if self._decoded(ids) != self._decoded(encoded.ids):
                raise DataError(
                    f"the tokenizer can't encode the answer of message {turn.number} apart from what is before it "
                    f"without changing the text; begin it otherwise than with {turn.text[len(turn.prompt) :][:10]!r}"
                )
        return ids, [(turn.number, first, len(ids))]

    def encode(self, count: int, prompt: bool) -> list[int]:
        """Encode the first `count` messages as inference does."""
        return encode_chat(self._tokenizer, self._template, self._messages[:count], prompt, self._tools)

    def plain(self, count: int, text: str) -> PlainText | None:
        """Encode the text of the first `count` messages, where nothing in it was typed that looks like a token."""
        tokenizer = self._tokenizer
        typed = [*self._messages[:count], {"role": "tools", "tools": self._tools}]
        return tokenizer.chat_encoder.encode_plain(typed, text, tokenizer.encode_markup)

    def _turn(self, number: int) -> _Turn:
        prompt = self._render(self._messages[:number], True, self._tools)
        text = self._render(self._messages[: number + 1], False, self._tools)
        if not text.startswith(prompt):
            place = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(text))
            raise DataError(
                "the chat template can't be trained on this conversation: what it writes before the answer of message "
                f"{number} isn't how it begins with the answer. They part at character {place}: "
                f"{prompt[place:][:_SHOWN]!r} and {text[place:][:_SHOWN]!r}"
            )
        return _Turn(number, prompt, text)

    def _answer(self, turn: _Turn) -> list[int]:
        """Encode an answer on its own; what is typed in it stays text."""

        def rendered(messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
            prompt, text = self._render(messages[:-1], True, tools), self._render(messages, False, tools)
            return text[len(prompt) :]

        return encode_rendered(self._tokenizer, self._messages[: turn.number + 1], self._tools, rendered)

    def _render(self, messages: Sequence[Message], prompt: bool, tools: Sequence[Tool] | None) -> str:
        return render(self._template, messages, prompt, self._tokenizer, tools)

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)


class _Encoded:
    """The ids of a conversation up to an answer, and how many of them are of a beginning of it."""

    def __init__(self, talk: _Talk, turn: _Turn) -> None:
        self._talk = talk
        self._plain = talk.plain(turn.number + 1, turn.text)
        self.ids = self._plain.ids if self._plain else talk.encode(turn.number + 1, False)

    def count(self, messages: int, text: str, prompt: bool) -> int | None:
        """Count the ids of the first messages, whose text is `text`; None if these are others when alone."""
        known = self._plain.count(len(text)) if self._plain else None
        if known is not None:
            return known if known >= 0 else None
        alone = self._talk.encode(messages, prompt)
        return len(alone) if self.ids[: len(alone)] == alone else None
