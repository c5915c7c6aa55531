"""From logits to the next token of each row.

The order, fixed: repetition penalty; temperature 0 takes the most likely token, else the logits are divided by
the temperature; the top_k most likely are kept; of these, renormalised, the smallest set of most likely ones
whose probability reaches top_p; one is drawn. A row has a random generator of its own, on the CPU, and takes one
number of it for each token, so its text doesn't depend on the device or on the rest of the batch.

Shapes: B rows, V vocabulary, C candidates.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ternlm.config.section import ConfigError, UserError


@dataclass(frozen=True)
class SamplingParams:
    """How text is continued. Raises ConfigError for a value outside its rule."""

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

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": ("at least 1", self.max_new_tokens >= 1),
            "temperature": ("finite and at least 0", 0 <= self.temperature < math.inf),
            "top_k": ("at least 0 (0: no limit)", self.top_k >= 0),
            "top_p": ("above 0 and at most 1", 0 < self.top_p <= 1),
            "repetition_penalty": ("finite and above 0", 0 < self.repetition_penalty < math.inf),
        }
        for name, (rule, kept) in rules.items():
            if not kept:
                raise ConfigError(f"{name} = {getattr(self, name)} must be {rule}")


def make_generators(seed: int, prompts: Sequence[Sequence[int]]) -> list[torch.Generator]:
    """Return a random generator for each prompt.

    It depends on the seed, the prompt and how many times the same prompt came before: never on other prompts, yet
    a prompt given twice is continued in two ways.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in prompts:
        key = tuple(prompt)
        digest = hashlib.sha256(repr((seed, seen[key], key)).encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True)))
        seen[key] += 1
    return generators


def sample(
    logits_BV: Tensor,
    params: SamplingParams,
    generators: Sequence[torch.Generator],
    seen_BV: Tensor | None = None,
) -> Tensor:
    """Return each row's next token, (B,). Raises UserError where a row's logits are NaN or infinite.

    generators: one a row; not touched where the temperature is 0. seen_BV: bool, the tokens in a row's prompt
    and text so far; needed only with a repetition penalty.
    """
    logits_BV = logits_BV.float()
    if not logits_BV.amax(-1).isfinite().all():
        raise UserError("the model's logits are not finite; its weights are broken, or overflow in this dtype")
    if params.repetition_penalty != 1:
        if seen_BV is None:
            raise ValueError("a repetition penalty needs seen_BV")
        penalty = params.repetition_penalty
        lowered_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(seen_BV, lowered_BV, logits_BV)
    if params.temperature == 0:
        return logits_BV.argmax(-1)
    # The largest logit at 0 keeps a tiny temperature from dividing to infinity.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / params.temperature
    if params.top_k == 0 and params.top_p == 1:
        return _draw(logits_BV.softmax(-1), generators)
    num_candidates = min(params.top_k or logits_BV.shape[1], logits_BV.shape[1])
    logits_BC, tokens_BC = logits_BV.topk(num_candidates)  # most likely first
    probabilities_BC = logits_BC.softmax(-1)
    if params.top_p < 1:
        above_BC = probabilities_BC.cumsum(-1) - probabilities_BC
        probabilities_BC = torch.where(above_BC < params.top_p, probabilities_BC, 0.0)
    return tokens_BC.gather(-1, _draw(probabilities_BC, generators)[:, None])[:, 0]


def _draw(weights_BC: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw an index of each row in proportion to its weights, by inverting their running sum."""
    sums_BC = weights_BC.double().cumsum(-1)  # in float32 the rare ones of 100,000 candidates would vanish
    uniform_B = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    total_B = sums_BC[:, -1]
    # Below the total also after rounding, so that the index found has a weight.
    points_B = torch.minimum(uniform_B.to(total_B.device) * total_B, total_B.nextafter(total_B.new_zeros(())))
    return torch.searchsorted(sums_BC, points_B[:, None], right=True)[:, 0]
