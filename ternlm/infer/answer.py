"""One answer out of an engine's events: text up to a stop string, its tokens, how likely they were, why it ended.

Text is told once it is settled: whole characters, and nothing that may yet turn out to be a stop string.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ternlm.data.tokenizer import Tokenizer
from ternlm.infer.request import Event, Finish
from ternlm.infer.sampling import Logprobs
from ternlm.infer.text import TextStream


@dataclass(frozen=True)
class Said:
    """A token of an answer."""

    token: int
    place: int
    """Characters of the answer before it; those of one that begins within a character are the whole ones."""
    logprobs: Logprobs | None


@dataclass(frozen=True)
class Delta:
    """What is new of an answer."""

    text: str = ""
    said: tuple[Said, ...] = ()
    """Tokens whose text has been told, by this delta or those before."""
    num_tokens: int = 0
    """Tokens that were generated, also those whose text waits or is never told."""
    finish: Finish | None = None
    num_cached: int = 0
    """Tokens of the prompt that were found stored; the same in each delta."""
    prompt_logprobs: tuple[Logprobs, ...] = ()
    """Of the prompt's second token and those after it, if they are wanted: in the first delta."""


class StopStrings:
    """Lets a text through up to the first of some strings."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return what comes before a stop string for sure, and whether one was found; then no more may be added."""
        if not self._stops:
            return text, False
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        # What may begin a stop string is held back.
        first = max(len(text) - self._longest + 1, 0)
        begun = (i for i in range(first, len(text)) if any(stop.startswith(text[i:]) for stop in self._stops))
        place = next(begun, len(text))
        self._held = text[place:]
        return text[:place], False

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


class Answer:
    """Takes the events of one request, gives deltas."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        shown: Sequence[int] = (),
        min_new_tokens: int = 0,
    ) -> None:
        """stops: strings that end the text. shown: special tokens that are part of it, by their names.

        min_new_tokens: tokens in which no stop string is looked for.
        """
        self._stream = TextStream(tokenizer, prompt, shown)
        self._stops = StopStrings(stops)
        self._min_new_tokens = min_new_tokens
        self._waiting: list[Said] = []
        self._num_tokens = self._length = self._told = 0
        self._begun = False
        self.finish: Finish | None = None

    def take(self, event: Event) -> Delta | None:
        """Go on by an event; None after the end. Where the delta ends the answer and the event doesn't, a stop string
        was found: the request is to be let go of."""
        if self.finish is not None:
            return None
        text, stopped = "", False
        if event.token is not None:
            self._num_tokens += 1
            place = self._length
            text, stopped = self._look(self._stream.add([event.token]))
            self._waiting.append(Said(event.token, place, event.logprobs))
        if event.finish is not None and not stopped:
            rest, stopped = self._look(self._stream.finish())
            text += rest if stopped else rest + self._stops.finish()
        self.finish = "stop" if stopped else event.finish
        self._told += len(text)
        request, first = event.request, not self._begun
        self._begun = True
        return Delta(
            text,
            self._settled(stopped),
            int(event.token is not None),
            self.finish,
            request.num_cached,
            tuple(request.prompt_logprobs) if first else (),
        )

    def _look(self, text: str) -> tuple[str, bool]:
        self._length += len(text)
        return (text, False) if self._num_tokens < self._min_new_tokens else self._stops.add(text)

    def _settled(self, stopped: bool) -> tuple[Said, ...]:
        """Take the waiting tokens whose text has been told; after a stop string, those that begin before it."""
        all_told = not stopped and (self._told == self._length or self.finish is not None)
        count = len(self._waiting) if all_told else sum(each.place < self._told for each in self._waiting)
        settled, self._waiting = tuple(self._waiting[:count]), self._waiting[count:]
        return settled
