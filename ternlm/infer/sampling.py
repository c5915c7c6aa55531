"""From logits to the next token of each row, every row by parameters of its own.

The order, fixed: what isn't allowed and logit_bias; penalties; temperature 0 takes the most likely token, else the
logits are divided by the temperature; the top_k most likely are kept; of these, renormalised, the smallest set of most
likely ones whose probability reaches top_p; of these, those with min_p of the most likely one's; one is drawn. A row
has a random generator of its own, on the CPU, and takes one number of it for each token, so its text doesn't depend on
the device or on the rest of the batch.

Shapes: B rows, V vocabulary, R rows that draw, C candidates.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ternlm.infer.params import SamplingParams

NOT_FINITE = "the model's logits are not finite; its weights are broken, or overflow in this dtype"
_CANDIDATES = 256
"""As many of the most likely tokens are sorted; only where they aren't enough, all."""


@dataclass
class Row:
    """A text that gets its next token."""

    params: SamplingParams
    generator: torch.Generator
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    """Tokens so far, without the prompt's."""
    allowed_V: Tensor | None = None
    """bool; None: all are."""


@dataclass(frozen=True)
class Logprobs:
    """How likely a token was, and which ones were the likeliest: natural logarithms."""

    token: float
    top: list[tuple[int, float]] = field(default_factory=list)
    """Token ids with theirs, the likeliest first."""


def make_generators(seed: int, prompts: Sequence[Sequence[int]]) -> list[torch.Generator]:
    """Return a random generator for each prompt.

    It depends on the seed, the prompt and how many times the same prompt came before: never on other prompts, yet
    a prompt given twice is continued in two ways.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in prompts:
        key = tuple(prompt)
        generators.append(make_generator(seed, prompt, seen[key]))
        seen[key] += 1
    return generators


def make_generator(seed: int, prompt: Sequence[int], time: int = 0) -> torch.Generator:
    """Return the random generator of a prompt that is continued for the `time`-th time, counted from 0."""
    digest = hashlib.sha256(repr((seed, time, tuple(prompt))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def are_finite(logits_BV: Tensor) -> list[bool]:
    """Say of each row whether a token can be drawn of it: none of its logits is NaN, and the largest isn't infinite."""
    return logits_BV.amax(-1).isfinite().tolist()


def sample(logits_BV: Tensor, rows: Sequence[Row]) -> list[int]:
    """Return each row's next token; rows are finite, as `are_finite` says."""
    logits_BV = _adjusted(logits_BV.float(), rows)
    drawing = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    tokens = logits_BV.argmax(-1).tolist() if len(drawing) < len(rows) else [0] * len(rows)
    for limited in (False, True):
        chosen = [i for i in drawing if rows[i].params.limits == limited]
        if chosen:
            found = _draw_rows(logits_BV[chosen], [rows[i] for i in chosen], limited)
            for i, token in zip(chosen, found, strict=True):
                tokens[i] = token
    return tokens


def logprobs_of(logits_BV: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Logprobs]:
    """Return the log-probability of each row's token and of the counts[b] likeliest ones."""
    logits_BV = logits_BV.float()
    totals_B = logits_BV.logsumexp(-1)
    index_B1 = torch.tensor(tokens, device=logits_BV.device)[:, None]
    chosen_B = logits_BV.gather(-1, index_B1)[:, 0] - totals_B
    most = max(counts)
    top_BC, ids_BC = (logits_BV - totals_B[:, None]).topk(most) if most else (logits_BV[:, :0], logits_BV[:, :0])
    tops = [list(zip(map(int, i), v, strict=True)) for i, v in zip(ids_BC.tolist(), top_BC.tolist(), strict=True)]
    found = zip(chosen_B.tolist(), tops, counts, strict=True)
    return [Logprobs(value, top[:count]) for value, top, count in found]


def _adjusted(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Apply what each row forbids, favours and penalises; the given logits stay as they are."""
    changed: Tensor | None = None
    for i, row in enumerate(rows):
        params = row.params
        early = len(row.output) < params.min_new_tokens and params.stop_ids
        if row.allowed_V is None and not params.logit_bias and not params.penalizes and not early:
            continue
        if changed is None:
            changed = logits_BV.clone()
        logits_V = changed[i]
        if row.allowed_V is not None:
            logits_V.masked_fill_(~row.allowed_V, -math.inf)
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            index = torch.tensor(ids, device=logits_V.device)
            logits_V.index_add_(0, index, torch.tensor(values, device=logits_V.device))
        if params.penalizes:
            _penalize(logits_V, row)
        if early:
            logits_V[torch.tensor(sorted(params.stop_ids), device=logits_V.device)] = -math.inf
    return logits_BV if changed is None else changed


def _penalize(logits_V: Tensor, row: Row) -> None:
    params = row.params
    if params.repetition_penalty != 1:
        ids = torch.tensor(sorted({*row.prompt, *row.output}), device=logits_V.device)
        own = logits_V[ids]
        penalty = params.repetition_penalty
        logits_V[ids] = torch.where(own > 0, own / penalty, own * penalty)
    if (params.presence_penalty or params.frequency_penalty) and row.output:
        counts = Counter(row.output)
        ids = torch.tensor(list(counts), device=logits_V.device)
        times = torch.tensor(list(counts.values()), device=logits_V.device)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * times


def _draw_rows(logits_RV: Tensor, rows: Sequence[Row], limited: bool) -> list[int]:
    """Draw a token of each row at its temperature, within its limits where rows have any."""
    smallest = torch.finfo(torch.float32).tiny
    temperatures_R1 = _column([max(row.params.temperature, smallest) for row in rows], logits_RV)
    # The largest logit at 0 keeps a tiny temperature from dividing to infinity.
    logits_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperatures_R1
    uniform_R = torch.stack([torch.rand((), generator=row.generator, dtype=torch.float64) for row in rows])
    uniform_R = uniform_R.to(logits_RV.device)
    if not limited:
        return _draw(logits_RV.softmax(-1), uniform_R).tolist()
    vocab = logits_RV.shape[1]
    wanted = max(row.params.top_k for row in rows)
    num = min(vocab, max(_CANDIDATES, wanted))
    tokens_R, enough_R = _draw_limited(logits_RV, rows, uniform_R, num)
    if num < vocab and not bool(enough_R.all()):
        short = (~enough_R).nonzero()[:, 0]
        others = [rows[i] for i in short.tolist()]
        tokens_R[short], _ = _draw_limited(logits_RV[short], others, uniform_R[short], vocab)
    return tokens_R.tolist()


def _draw_limited(logits_RV: Tensor, rows: Sequence[Row], uniform_R: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Draw among each row's `num` most likely tokens; also return of which rows no other could have been drawn."""
    vocab = logits_RV.shape[1]
    logits_RC, tokens_RC = logits_RV.topk(num)  # most likely first
    top_k_R1 = _column([min(row.params.top_k or vocab, vocab) for row in rows], logits_RV)
    top_p_R1 = _column([row.params.top_p for row in rows], logits_RV)
    min_p_R1 = _column([row.params.min_p for row in rows], logits_RV)
    ranks_C = torch.arange(num, device=logits_RV.device)
    logits_RC = logits_RC.masked_fill(ranks_C >= top_k_R1, -math.inf)
    whole_R1 = torch.where(
        top_k_R1 <= num, logits_RC.logsumexp(-1, keepdim=True), logits_RV.logsumexp(-1, keepdim=True)
    )
    probabilities_RC = (logits_RC - whole_R1).exp()
    sums_RC = probabilities_RC.cumsum(-1)
    kept_RC = (sums_RC - probabilities_RC < top_p_R1) | (top_p_R1 == 1)
    kept_RC &= probabilities_RC >= min_p_R1 * probabilities_RC[:, :1]
    kept_RC[:, 0] = True  # also where top_p is too small for float32
    enough_R = (top_k_R1[:, 0] <= num) | ~kept_RC[:, -1] | (num == vocab)
    return tokens_RC.gather(-1, _draw(probabilities_RC * kept_RC, uniform_R)[:, None])[:, 0], enough_R


def _draw(weights_RC: Tensor, uniform_R: Tensor) -> Tensor:
    """Draw an index of each row in proportion to its weights, by inverting their running sum."""
    sums_RC = weights_RC.double().cumsum(-1)  # in float32 the rare ones of 100,000 candidates would vanish
    total_R = sums_RC[:, -1]
    # Below the total also after rounding, so that the index found has a weight.
    points_R = torch.minimum(uniform_R * total_R, total_R.nextafter(total_R.new_zeros(())))
    return torch.searchsorted(sums_RC, points_R[:, None], right=True)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None]
