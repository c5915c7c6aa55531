"""How one text is continued: what may be drawn, what ends it, what is told of it."""

import math
from dataclasses import dataclass

from ternlm.config.section import ConfigError

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How a text is continued. Raises ConfigError for a value outside its rule."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """0: no limit."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    """Positive logits of tokens in the prompt or the text so far are divided by it, negative ones multiplied
    (arXiv 1909.05858); 1: none."""
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end a text; they aren't part of it."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one's probability are left out (arXiv 2407.01082)."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the text so far has, the prompt left aside."""
    frequency_penalty: float = 0.0
    """Taken off as many times as the text so far has the token."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their logits."""
    min_new_tokens: int = 0
    """So many tokens come before one of `stop_ids` may."""
    logprobs: int | None = None
    """Tell each token's log-probability and that of so many of the likeliest, as the model gives them: before
    temperature, penalties and limits."""

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": ("at least 1", self.max_new_tokens >= 1),
            "temperature": ("finite and at least 0", 0 <= self.temperature < math.inf),
            "top_k": ("at least 0 (0: no limit)", self.top_k >= 0),
            "top_p": ("above 0 and at most 1", 0 < self.top_p <= 1),
            "repetition_penalty": ("finite and above 0", 0 < self.repetition_penalty < math.inf),
            "min_p": ("at least 0 and at most 1", 0 <= self.min_p <= 1),
            "presence_penalty": ("finite", math.isfinite(self.presence_penalty)),
            "frequency_penalty": ("finite", math.isfinite(self.frequency_penalty)),
            "logit_bias": ("ids with finite numbers", all(math.isfinite(bias) for _, bias in self.logit_bias)),
            "min_new_tokens": ("from 0 to max_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens),
            "logprobs": (f"from 0 to {MAX_LOGPROBS}", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS),
        }
        for name, (rule, kept) in rules.items():
            if not kept:
                raise ConfigError(f"{name} = {getattr(self, name)} must be {rule}")

    @property
    def penalizes(self) -> bool:
        """Whether what was said counts."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def limits(self) -> bool:
        """Whether only some of the tokens may be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0
