"""Conversations to ids, in which what people typed stays text, byte for byte, whatever it looks like.

Special tokens are for the chat template alone. Exported chat models carry a copy of this file, so that their `chat`
sends the same ids: it imports nothing of TernLM and knows no protocol.
"""

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

# What a model says of its own accord, and templates look for: in its turns these are tokens, as it made them.
_OWN = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_TAILS = 4096
_LONG = 20_000
"""Characters from which on a text takes milliseconds."""
_PRIVATE = (range(0xE001, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


def encode_text(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Return a text's ids, without those of its beginning and end. Other threads go on while a long one is encoded."""
    if len(text) < _LONG:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=False)  # a single one would hold Python's lock
    return list(encoding.ids)


class ChatEncoder:
    """Encodes conversations with a tokenizer whose special and other added tokens it hides from what was typed."""

    def __init__(self, content: str) -> None:
        """content: of a tokenizer.json."""
        self._content = content
        read = json.loads(content)
        added = read.get("added_tokens") or []
        # A single character, or blanks, can't pose as anything; some tokenizers have such tokens for plain text.
        self._ids = {
            token["content"]: token["id"] for token in added if len(token["content"]) > 1 and token["content"].strip()
        }
        self._any = _any_of(self._ids)
        self._any_but_own = _any_of(token for token in self._ids if token not in _OWN)
        self._special = frozenset(self._ids.values())
        self._look = _Look(self._ids, self._any, self._any_but_own)
        # What follows one of these is encoded as if nothing stood before it.
        normalizes = bool(read.get("normalizer"))
        self._cuts = {token["content"] for token in added if not (normalizes and token.get("normalized"))}
        self._tails: dict[tuple[str, str], list[int] | None] = {}
        self._nonce = f"\ue000{secrets.token_hex(8)}:"  # nobody can type what begins with it

    def encode_typed(self, text: str) -> list[int]:
        """Encode what somebody typed: no special or added token of several characters, whatever the text looks like."""
        return encode_text(self._plain, text)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        render: Callable[[Sequence[Mapping[str, Any]]], str],
        encode_markup: Callable[[str], list[int]],
    ) -> list[int]:
        """Return the ids of a conversation: those of its whole text at once, where nothing in it poses as a token.

        render: the chat template. encode_markup: the tokenizer's own way, which finds every added token in a text.
        Raises ValueError for a conversation that holds each of Unicode's 137,000 private characters.
        """
        whole = render(messages)
        hiding = _Hiding(self._look, lambda: [whole, *_texts(messages)])
        hidden = [hiding.message(message) for message in messages]
        text = render(hidden) if hiding.shown else whole
        found = self._any.findall(text)
        if not hiding.posing and (text is whole or found == self._any.findall(whole)):
            ids = encode_markup(whole)
            if self._holds(ids, found):
                return ids
        named = self._any.sub(lambda match: self._name(match[0]), text)
        return self.encode_typed(named.translate({ord(mark): part for mark, part in hiding.shown.items()}))

    def encode_plain(
        self, messages: Sequence[Mapping[str, Any]], text: str, encode_markup: Callable[[str], list[int]]
    ) -> "PlainText | None":
        """Encode the text of a conversation in which nothing typed could be taken for a token; None if something is.

        The ids are those of `encode`, and those of the text's beginnings can be told from them.
        """
        hiding = _Hiding(self._look, lambda: [text, *_texts(messages)])
        for message in messages:
            hiding.message(message)
            if hiding.shown:
                return None
        ids, found = encode_markup(text), list(self._any.finditer(text))
        if not self._holds(ids, [match[0] for match in found]):
            return None
        places = [place for place, index in enumerate(ids) if index in self._special]
        return PlainText(text, ids, found, places, lambda token, rest: self._tail(token, rest, encode_markup))

    def _tail(self, token: str, text: str, encode_markup: Callable[[str], list[int]]) -> list[int] | None:
        """Return the ids of a text between a token and an end; None where they may depend on what is around them."""
        key = token, text
        if key not in self._tails:
            ids = encode_markup(token + text)
            alone = bool(ids) and ids[0] == self._ids[token] and not self._special.intersection(ids[1:])
            if len(self._tails) >= _TAILS:
                self._tails.clear()
            self._tails[key] = ids[1:] if alone and token in self._cuts else None
        return self._tails[key]

    def _holds(self, ids: Iterable[int], tokens: Iterable[str]) -> bool:
        """Say whether the added tokens among `ids` are these."""
        return [self._ids[token] for token in tokens] == [index for index in ids if index in self._special]

    def _name(self, token: str) -> str:
        """Return what `_plain` calls a token."""
        return f"{self._nonce}{self._ids[token]}\ue000"

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The tokenizer with other names for its added tokens, of the same ids, which nobody can type."""
        content = json.loads(self._content)
        model = content["model"]
        merged = {part for merge in model.get("merges") or () for part in _parts(merge)}
        for token in content["added_tokens"]:
            old = token["content"]
            if old not in self._ids:
                continue
            new = self._name(old)
            token |= {"content": new, "normalized": False, "single_word": False}
            if isinstance(model["vocab"], list):  # of pieces and scores, in the order of ids
                if token["id"] < len(model["vocab"]):
                    model["vocab"][token["id"]][0] = new
                continue
            if old not in merged:
                model["vocab"].pop(old, None)
            model["vocab"][new] = token["id"]
            if model.get("unk_token") == old:
                model["unk_token"] = new
        content |= {"post_processor": None, "truncation": None, "padding": None}
        return tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))


class PlainText:
    """The ids of a text that a template made, and how many of them are of a beginning of it."""

    def __init__(
        self,
        text: str,
        ids: list[int],
        found: Sequence[re.Match[str]],
        places: Sequence[int],
        tail: Callable[[str, str], list[int] | None],
    ) -> None:
        """found: the added tokens in the text; places: theirs among the ids; tail: the ids of what follows one."""
        self.text, self.ids = text, ids
        self._found, self._places, self._tail = found, places, tail
        self._ends = [match.end() for match in found]

    def count(self, size: int) -> int | None:
        """Count the ids of the first `size` characters, if these alone have the same ids.

        Returns -1 if they have other ids, and None if only encoding them can tell. An added token among them can:
        encoding begins anew behind it, so what follows the last of them is all that must be compared.
        """
        number = bisect_right(self._ends, size)
        if not number or (number < len(self._found) and self._found[number].start() < size):
            return None
        token, first = self._found[number - 1][0], self._places[number - 1] + 1
        tail = self._tail(token, self.text[self._ends[number - 1] : size])
        if tail is None:
            return None
        return first + len(tail) if self.ids[first : first + len(tail)] == tail else -1


class _Look:
    """What can be taken for a token, or for a part of one."""

    def __init__(self, tokens: Iterable[str], found: re.Pattern[str], found_but_own: re.Pattern[str]) -> None:
        self.tokens, self.found, self.found_but_own = tuple(tokens), found, found_but_own
        self.starts = {token[:cut] for token in self.tokens for cut in range(1, len(token))}
        self.ends = {token[cut:] for token in self.tokens for cut in range(1, len(token))}
        self.longest = max(map(len, self.tokens), default=0)


class _Hiding:
    """Puts private characters, found nowhere else, in the place of what must not be taken for a token."""

    def __init__(self, look: _Look, texts: Callable[[], Iterable[str]]) -> None:
        """texts: gives all in which a private character must not be taken for one of these."""
        self.shown: dict[str, str] = {}
        """What each private character stands for."""
        self.posing = False
        """Whether a whole token was typed."""
        self._look = look
        self._marks: dict[str, str] = {}
        self._unused = _unused(texts)

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message in which nothing is a token but a model's own, nor a part of one with what is around it."""
        found = self._look.found_but_own if message.get("role") == "assistant" else self._look.found
        hidden = {key: self._without(value, found) for key, value in message.items()}
        if isinstance(hidden.get("content"), str):
            hidden["content"] = self._with_closed_ends(hidden["content"])
        return hidden

    def _without(self, value: Any, found: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            text = found.sub(lambda match: self._mark(match[0]), value)
            self.posing = self.posing or text != value
            return text
        if isinstance(value, Mapping):
            return {self._name_without(key, found): self._without(each, found) for key, each in value.items()}
        return [self._without(each, found) for each in value] if isinstance(value, list | tuple) else value

    def _name_without(self, key: Any, found: re.Pattern[str]) -> Any:
        # Names that a template looks up are identifiers; others, such as a tool's arguments', can be anything.
        return key if not isinstance(key, str) or key.isidentifier() else self._without(key, found)

    def _with_closed_ends(self, text: str) -> str:
        """Hide the first or last character that could be of a token begun before it, or ended behind it."""
        inner = text.strip()
        if not inner:
            return text
        first, last = text.index(inner), text.index(inner) + len(inner) - 1
        look, sizes = self._look, range(1, self._look.longest)
        within = len(inner) < look.longest and any(inner in token and inner != token for token in look.tokens)
        if within or any(inner[:size] in look.ends for size in sizes):
            text = text[:first] + self._mark(text[first]) + text[first + 1 :]
        if any(inner[-size:] in look.starts for size in sizes):
            text = text[:last] + self._mark(text[last]) + text[last + 1 :]
        return text

    def _mark(self, part: str) -> str:
        if part in self.shown:
            return part
        if part not in self._marks:
            mark = next(self._unused, None)
            if mark is None:
                raise ValueError("the conversation holds all of Unicode's private characters; leave one out")
            self._marks[part] = mark
            self.shown[mark] = part
        return self._marks[part]


def _unused(texts: Callable[[], Iterable[str]]) -> Iterator[str]:
    """Yield the private characters that are in none of these texts."""
    taken = set().union(*texts())
    yield from (chr(code) for codes in _PRIVATE for code in codes if chr(code) not in taken)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return what finds the tokens in a text, the longest where several begin at one place."""
    return re.compile("|".join(map(re.escape, sorted(tokens, reverse=True))) or r"(?!)")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.items() for each in item for text in _texts(each))
    elif isinstance(value, list | tuple):
        yield from (text for each in value for text in _texts(each))


def _parts(merge: Any) -> tuple[str, str, str]:
    """Return what a merge joins, and what it makes."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right
