"""The seam between HTTP and what generates: jobs of tokens in, typed deltas out. Engines stand behind one protocol."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ternlm.data.tokenizer import Tokenizer
from ternlm.infer.answer import Delta
from ternlm.infer.chat import Dialect
from ternlm.infer.params import SamplingParams
from ternlm.infer.worker import Load


@dataclass(frozen=True)
class Job:
    """A text to continue, checked."""

    prompt: tuple[int, ...]
    params: SamplingParams
    stops: tuple[str, ...] = ()
    """Strings that end the text."""
    shown: tuple[int, ...] = ()
    """Special tokens that are part of the text, by their names."""
    time: int = 0
    """How many jobs of the same prompt and seed came before it: each has random numbers of its own."""
    grammar: str | None = None
    """What the text must keep to, as `infer.constraint` takes it."""
    wants_prompt: bool = False
    """Whether the prompt's log-probabilities are wanted."""


class Answers(Protocol):
    """What comes of jobs, in the order in which it is generated; ends once all of them have."""

    def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Give the number of a job, and what is new of its text."""

    def close(self) -> None:
        """Let go of the jobs that haven't ended: nobody wants them any more."""


class Backend(Protocol):
    """An engine."""

    async def start(self, jobs: Sequence[Job]) -> Answers:
        """Take all of the jobs in, or none. Raises UserError for what can't be served, `Overloaded`, `Closed`."""

    def load(self) -> Load:
        """Say how busy it is."""

    @property
    def is_alive(self) -> bool:
        """Whether it serves."""

    async def close(self, seconds: float) -> None:
        """Take nothing more; let what runs go on for so long at most, then end the rest as cancelled."""


@dataclass(frozen=True)
class ServedModel:
    """What the front end knows of a model."""

    name: str
    created: int
    """Seconds since 1970."""
    tokenizer: Tokenizer
    vocab_size: int
    max_tokens: int
    """Of a prompt and its continuation."""
    max_jobs: int
    """Texts that one request may ask for: as many as may run or wait."""
    stop_ids: frozenset[int]
    """What ends a text."""
    dialect: Dialect | None
    """How one chats with it."""
    why_not: str = ""
    """Why there is no dialect."""
