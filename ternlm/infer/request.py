"""A text that the engine continues, and what it has become so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from ternlm.infer.pages import Pages
from ternlm.infer.params import SamplingParams
from ternlm.infer.sampling import Logprobs, Row

Finish = Literal["stop", "length", "cancelled", "error"]
"""Why a text ended: by a stop token or what its reader stops at, by its length, let go of, or since it can't go on."""


class GivenUp(Exception):
    """A text can't go on as its constraint demands."""


class Constraint(Protocol):
    """What a text must keep to, token by token."""

    def allowed(self) -> Tensor | None:
        """Return which tokens may come next, bool (V,); None: all. Raises GivenUp, which ends the text."""

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed."""


@dataclass(frozen=True)
class Event:
    """What a step brought a request: a token, its end, or the end alone."""

    request: "Request"
    token: int | None
    """None where it ended without another token, as by a stop token."""
    logprobs: Logprobs | None
    finish: Finish | None


@dataclass(eq=False)
class Request:
    """A prompt and its continuation. The engine writes to it, others read."""

    prompt: Sequence[int]
    params: SamplingParams
    generator: torch.Generator
    constraint: Constraint | None = None
    wants_prompt: bool = False
    """Whether `prompt_logprobs` are wanted."""
    rope_length: int = 0
    """Context that dynamic rope scaling assumes; 0 where it doesn't depend on it."""
    output: list[int] = field(default_factory=list)
    finish: Finish | None = None
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """Of the prompt's second token and those after it."""
    pages: Pages | None = None
    """None where no memory is held."""
    num_stored: int = 0
    """Tokens whose keys and values are stored."""
    num_cached: int = 0
    """Tokens of the prompt that were found stored when it began."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self) -> list[int]:
        """Return prompt and continuation."""
        return [*self.prompt, *self.output]

    def row(self) -> Row:
        """Return what the next token depends on beside the logits."""
        allowed = self.constraint.allowed() if self.constraint else None
        return Row(self.params, self.generator, self.prompt, self.output, allowed)
