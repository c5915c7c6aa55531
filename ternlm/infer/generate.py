"""Continue prompts: one prefill of all of them, then a token of each row at a time over the cache.

Prompts of unequal length go together, padded at their ends. Tokens in, tokens out: text is for the caller.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError
from ternlm.infer.cache import KVCache
from ternlm.infer.sampling import SamplingParams, make_generators, sample
from ternlm.model.decoder import CausalLM

OnToken = Callable[[int, int], None]
"""`(row, token)`, called for each token of a text as soon as it is known; not for the one that stops it."""


@torch.no_grad()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Return the continuation of each prompt, without the prompt and without the stop token.

    Under autocast the cache has autocast's dtype, else the weights'. Blocks compiled for training would be compiled
    anew for each length: call it under `torch.compiler.set_stance("force_eager")`. Raises ConfigError for a prompt that
    is empty, has ids outside the vocabulary, or with max_new_tokens grows past the model's positions.
    """
    for row, prompt in enumerate(prompts):
        _check(model.config, row, prompt, params.max_new_tokens)
    generators = make_generators(params.seed, prompts)
    texts: list[list[int]] = [[] for _ in prompts]

    def emit(row: int, token: int) -> None:
        texts[row].append(token)
        if on_token is not None:
            on_token(row, token)

    for rope_length, rows in _rows_by_rope_length(model.config, prompts, params.max_new_tokens).items():
        batch = {row: prompts[row] for row in rows}
        _generate_batch(model, batch, params, [generators[row] for row in rows], rope_length, emit)
    return texts


def _check(config: ModelConfig, row: int, prompt: Sequence[int], max_new_tokens: int) -> None:
    if not prompt:
        raise ConfigError(f"prompt {row} is empty; it needs at least one token, such as the tokenizer's bos")
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise ConfigError(
                f"prompt {row} has the token id {token}, but the model's vocabulary is 0 to "
                f"{config.vocab_size - 1}; encode it with the model's own tokenizer"
            )
    longest = config.max_position_embeddings
    if len(prompt) + max_new_tokens > longest and config.rope_scaling.kind == "default":
        raise ConfigError(
            f"prompt {row} of {len(prompt)} tokens and max_new_tokens = {max_new_tokens} exceed "
            f"max_position_embeddings = {longest}; shorten one of them or set rope_scaling"
        )


def _rows_by_rope_length(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> dict[int, list[int]]:
    """Group the rows that may share a forward pass.

    Dynamic scaling turns a row by the longest it may become, so that keys already cached stay valid; the rows
    of a batch must agree on it. Every length up to the trained one means the same.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        length = config.rope_original_length
        if config.rope_scaling.kind == "dynamic":
            length = max(length, len(prompt) + max_new_tokens)
        groups[length].append(row)
    return groups


def _generate_batch(
    model: CausalLM,
    prompts: dict[int, Sequence[int]],
    params: SamplingParams,
    generators: Sequence[torch.Generator],
    rope_length: int,
    emit: Callable[[int, int], None],
) -> None:
    """Continue prompts that go together until each has stopped; a stopped one idles along with the others."""
    rows, device = list(prompts), next(model.parameters()).device
    counts = [len(prompt) for prompt in prompts.values()]
    cache = KVCache(model.config, len(rows), max(counts) + params.max_new_tokens, _dtype(model), device)
    padded = [[*prompt, *[0] * (max(counts) - len(prompt))] for prompt in prompts.values()]
    tokens_BT = torch.tensor(padded, device=device)
    seen_BV = _seen(list(prompts.values()), model.config, device) if params.repetition_penalty != 1 else None
    active = [True] * len(rows)
    for _ in range(params.max_new_tokens):
        logits_BV = _last_logits(model, cache, tokens_BT, counts, rope_length)
        tokens_B = sample(logits_BV, params, generators, seen_BV)
        for i, token in enumerate(tokens_B.tolist()):
            active[i] = active[i] and token not in params.stop_ids
            if active[i]:
                emit(rows[i], token)
        if not any(active):
            return
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens_B[:, None], True)
        tokens_BT, counts = tokens_B[:, None], [int(goes_on) for goes_on in active]


def _last_logits(model: CausalLM, cache: KVCache, tokens_BT: Tensor, counts: Sequence[int], rope_length: int) -> Tensor:
    """Run the model over new tokens, counts[b] of row b, and return the logits after each row's last one, (B, V)."""
    positions_BT = cache.place(counts)
    hidden_BTD = model(tokens_BT, positions_BT, cache.attend, rope_length)
    last_B = torch.tensor(counts, device=hidden_BTD.device).clamp(min=1) - 1
    hidden_BD = hidden_BTD[torch.arange(len(counts), device=hidden_BTD.device), last_B]
    return model.lm_head(hidden_BD)


def _dtype(model: CausalLM) -> torch.dtype:
    weight = next(model.parameters())
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


def _seen(prompts: Sequence[Sequence[int]], config: ModelConfig, device: torch.device) -> Tensor:
    seen_BV = torch.zeros((len(prompts), config.vocab_size), dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        seen_BV[i, torch.tensor(prompt)] = True
    return seen_BV.to(device)
