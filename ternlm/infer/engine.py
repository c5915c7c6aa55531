"""Continue many texts at once: requests come and go between forward passes, which go over tokens of all of them.

Tokens in, tokens out: text is for others. One thread at a time may use an engine. The weights are the model's own, so
what training changes is what the next step computes with; `forget` then says that what is stored is out of date.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError, UserError
from ternlm.infer.fast import compute_dtype, is_fast, shared
from ternlm.infer.key_values import Piece
from ternlm.infer.native import make_cache
from ternlm.infer.pages import BLOCK, BlockPool
from ternlm.infer.params import SamplingParams
from ternlm.infer.request import Constraint, Event, Finish, GivenUp, Request
from ternlm.infer.sampling import (
    NOT_FINITE,
    Logprobs,
    Row,
    are_finite,
    logprobs_of,
    make_generator,
    make_generators,
    sample,
)
from ternlm.infer.scheduler import Scheduler, Share
from ternlm.model.decoder import CausalLM
from ternlm.ops.onednn import round_rows

_log = logging.getLogger(__name__)

_LOGIT_ROWS = 64
"""Rows of logits that are made at a time where a prompt's own are wanted."""


class Engine:
    """A model and the memory for the keys and values of texts."""

    def __init__(self, model: CausalLM, num_tokens: int, *, max_running: int = 64, max_step_tokens: int = 512) -> None:
        """Keep room for the keys and values of `num_tokens` tokens in all.

        max_running: texts that are continued at the same time; others wait. max_step_tokens: tokens of a forward pass:
        more make long prompts faster, fewer let the other texts wait less for them.

        Under autocast keys and values have autocast's dtype, else the weights'. Blocks compiled for training would be
        compiled anew for each length: call `step` under `torch.compiler.set_stance("force_eager")`.
        """
        weight = model.model.norm.weight
        num_blocks = -(-num_tokens // BLOCK)
        self.config, self.device = model.config, weight.device
        self._model = shared(model)
        self._dynamic = model.config.rope_scaling.kind == "dynamic"
        self.pool = BlockPool(num_blocks)
        self._cache = make_cache(model.config, num_blocks, compute_dtype(model), self.device)
        self.scheduler = Scheduler(self.pool, max_running, max_step_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest text: of what the model was trained for, unless it stretches, and of the memory."""
        room = self.pool.num_blocks * BLOCK
        return room if self.config.rope_scaling.kind != "default" else min(room, self.config.max_position_embeddings)

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        generator: torch.Generator | None = None,
        constraint: Constraint | None = None,
        wants_prompt: bool = False,
    ) -> Request:
        """Take a request in; `step` goes on with it. As `make`."""
        request = self.make(prompt, params, generator=generator, constraint=constraint, wants_prompt=wants_prompt)
        self.scheduler.add(request)
        return request

    def make(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        generator: torch.Generator | None = None,
        constraint: Constraint | None = None,
        wants_prompt: bool = False,
        name: str = "the prompt",
    ) -> Request:
        """Return a request that can be added; nothing of the engine changes.

        generator: where its random numbers come from; of params.seed and the prompt if not given. Raises ConfigError
        for one that could never be served: an empty prompt, ids outside the vocabulary, more tokens than the model or
        the memory has room for. name: what the error calls the prompt.
        """
        self.check(prompt, params, name)
        length = max(self.config.rope_original_length, len(prompt) + params.max_new_tokens) if self._dynamic else 0
        return Request(
            prompt=list(prompt),
            params=params,
            generator=generator or make_generator(params.seed, prompt),
            constraint=constraint,
            wants_prompt=wants_prompt,
            rope_length=length,
        )

    def check(self, prompt: Sequence[int], params: SamplingParams, name: str = "the prompt") -> None:
        """Raise ConfigError for what `add` refuses."""
        check_prompt(self.config, prompt, params.max_new_tokens, name)
        wrong = next((i for i, _ in params.logit_bias if not 0 <= i < self.config.vocab_size), None)
        if wrong is not None:
            last = self.config.vocab_size - 1
            raise ConfigError(f"logit_bias has the token id {wrong}, but the vocabulary is 0 to {last}; leave it out")
        whole, room = len(prompt) + params.max_new_tokens, self.pool.num_blocks * BLOCK
        if whole > room:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens with max_new_tokens = {params.max_new_tokens} may need memory for "
                f"{whole} tokens, and there is for {room}; shorten one of them"
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Return the continuation of each prompt, without the prompt and without the stop token.

        on_token: `(row, token)`, called for each token of a text as soon as it is known; not for the one that stops it.
        Equal prompts differ where params draw. Other requests that the engine has go on meanwhile. Raises ConfigError
        as `add` does, before anything is computed; UserError where logits aren't finite. Whatever is raised ends
        these requests: those alone, unless it is `step` that raises.
        """
        generators = make_generators(params.seed, prompts)
        rows = {
            self.make(prompt, params, generator=generator, name=f"prompt {row}"): row
            for row, (prompt, generator) in enumerate(zip(prompts, generators, strict=True))
        }
        try:
            for request in rows:
                self.scheduler.add(request)
            while any(request.finish is None for request in rows):
                for event in self.step():
                    if event.finish == "error" and event.request in rows:
                        raise UserError(NOT_FINITE)
                    if on_token is not None and event.token is not None and event.request in rows:
                        on_token(rows[event.request], event.token)
        finally:  # nobody else would ever let go of what an error leaves
            for request in rows:
                self.cancel(request)
        return [request.output for request in rows]

    def cancel(self, request: Request) -> None:
        """Let go of a request, whose text stays as it is; one that has ended already is left alone."""
        self.finish(request, "cancelled")

    def finish(self, request: Request, finish: Finish) -> None:
        """End a request from outside, as where its text has what its reader stops at."""
        if request.finish is None:
            request.finish = finish
            self.scheduler.remove(request)

    def reserve(self) -> None:
        """Take all of the memory now, before there is a request, so that none waits for it or finds it gone."""
        self._cache.memory.reserve()

    def forget(self) -> None:
        """Forget what is stored of texts that have ended: the weights have changed. No request may be running."""
        if self.scheduler.running:
            raise RuntimeError(f"{len(self.scheduler.running)} requests are running on the old weights; let them end")
        self.pool.forget()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Run one forward pass; return what it brought. Nothing to do: nothing returned.

        A text whose logits aren't finite, or whose constraint is given up, ends as "error", and the log says why; what
        else is wrong is raised, and every request has ended.
        """
        shares = self.scheduler.plan()
        if not shares:
            return []
        try:
            hidden_TD = self._forward(shares)
            events = self._next_tokens(hidden_TD, shares)
        except BaseException:
            self._abandon()
            raise
        for event in events:
            if event.finish is not None:
                self.scheduler.remove(event.request)
        return events

    def _forward(self, shares: Sequence[Share]) -> Tensor:
        pieces: list[Piece] = []
        tokens: list[int] = []
        lengths: list[int] = []
        for share in shares:
            request, count = share.request, len(share.tokens)
            assert request.pages is not None
            pieces.append(Piece(request.pages.blocks, request.num_stored, count))
            tokens.extend(share.tokens)
            lengths.extend([request.rope_length] * count)
        spare = [0] * (self._rows(len(tokens)) - len(tokens))
        positions_1T = self._cache.place(pieces, len(tokens) + len(spare))
        tokens_1T = torch.tensor([tokens + spare], device=self.device)
        rope_length = torch.tensor([lengths + spare], device=self.device) if self._dynamic else 0
        return self._model(tokens_1T, positions_1T, self._cache.attend, rope_length)[0]

    def _rows(self, num: int) -> int:
        """Return how many rows to compute with where `num` are wanted."""
        return round_rows(num) if is_fast(self._model) else num

    def _next_tokens(self, hidden_TD: Tensor, shares: Sequence[Share]) -> list[Event]:
        """Draw the next token of each request whose tokens are all stored now; end those that aren't finite."""
        ready, places, pending, ends, place = [], [], [], [], 0
        for share in shares:
            if share.request.wants_prompt:
                self._tell_prompt(hidden_TD[place : place + len(share.tokens)], share)
            place += len(share.tokens)
            if share.is_last:
                ready.append(share.request)
                places.append(place - 1)
            else:
                pending.append(share.request)
                ends.append(place - 1)
            share.request.num_stored += len(share.tokens)
        lost = []
        if pending:  # its last token has read all that is stored
            ends_PD = hidden_TD[torch.tensor(ends, device=self.device)]
            lost = self._lose(pending, _logged(ends_PD.isfinite().all(-1).tolist()))
        if not ready:
            return lost
        places += places[:1] * (self._rows(len(places)) - len(places))
        logits_BV = self._model.lm_head(hidden_TD[torch.tensor(places, device=self.device)])[: len(ready)]
        finite = _logged(are_finite(logits_BV))
        rows = [_row_of(request) if fine else None for request, fine in zip(ready, finite, strict=True)]
        good = [row is not None for row in rows]
        if not all(good):
            lost += self._lose(ready, good)
            ready = [request for request, fine in zip(ready, good, strict=True) if fine]
            if not ready:
                return lost
            logits_BV = logits_BV[torch.tensor(good, device=self.device)]
        tokens = sample(logits_BV, [row for row in rows if row is not None])
        logprobs = self._logprobs(logits_BV, tokens, ready)
        return lost + [self._event(*each) for each in zip(ready, tokens, logprobs, strict=True)]

    def _lose(self, requests: Sequence[Request], good: Sequence[bool]) -> list[Event]:
        """End texts that can't go on, and what is stored of them alone: not finite, it would spoil who comes next."""
        lost = [request for request, fine in zip(requests, good, strict=True) if not fine]
        for request in lost:
            assert request.pages is not None
            self._cache.memory.clear(self.pool.disown(request.pages))
            self.finish(request, "error")  # at once: the next one may then be the last that has a block
        return [Event(request, None, None, "error") for request in lost]

    def _logprobs(self, logits_BV: Tensor, tokens: Sequence[int], requests: Sequence[Request]) -> list[Logprobs | None]:
        found: list[Logprobs | None] = [None] * len(requests)
        asked = [i for i, request in enumerate(requests) if request.params.logprobs is not None]
        if asked:
            counts = [requests[i].params.logprobs or 0 for i in asked]
            told = logprobs_of(logits_BV[asked], [tokens[i] for i in asked], counts)
            for i, each in zip(asked, told, strict=True):
                found[i] = each
        return found

    def _event(self, request: Request, token: int, logprobs: Logprobs | None) -> Event:
        if token in request.params.stop_ids:
            request.finish = "stop"
            return Event(request, None, logprobs, "stop")
        request.output.append(token)
        if request.constraint is not None:
            request.constraint.accept(token)
        if len(request.output) == request.params.max_new_tokens:
            request.finish = "length"
        return Event(request, token, logprobs, request.finish)

    def _tell_prompt(self, hidden_TD: Tensor, share: Share) -> None:
        """Note how likely the prompt's tokens are that follow those of this share."""
        request = share.request
        first = request.num_stored + 1
        # One that gave its memory back is computed anew: what is known of it isn't noted again.
        known = len(request.prompt_logprobs) + 1 - first
        hidden_TD = hidden_TD[known:]
        targets = request.prompt[first + known : first + len(share.tokens)]
        for start in range(0, len(targets), _LOGIT_ROWS):
            own = targets[start : start + _LOGIT_ROWS]
            logits_BV = self._model.lm_head(hidden_TD[start : start + len(own)])
            request.prompt_logprobs += logprobs_of(logits_BV, own, [request.params.logprobs or 0] * len(own))

    def _abandon(self) -> None:
        """Drop every request after a step that failed: what its blocks hold is unknown."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            request.finish = request.finish or "error"
            self.scheduler.remove(request)
        self.pool.forget()
        self._cache.memory.clear()


def _logged(finite: list[bool]) -> list[bool]:
    """Return what is given; log those that aren't."""
    if not all(finite):
        _log.error("%d texts were ended: %s", finite.count(False), NOT_FINITE)
    return finite


def _row_of(request: Request) -> Row | None:
    """Return what the next token depends on; None where its constraint is given up."""
    try:
        return request.row()
    except GivenUp as error:
        _log.error("a text was ended: %s", error)
        return None


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    on_token: Callable[[int, int], None] | None = None,
    max_running: int = 64,
) -> list[list[int]]:
    """As `Engine.generate`, by an engine for these prompts alone, with as much memory as they need."""
    needs = sorted((-(-(len(prompt) + params.max_new_tokens) // BLOCK) + 1 for prompt in prompts), reverse=True)
    if not needs:
        return []
    for row, prompt in enumerate(prompts):
        check_prompt(model.config, prompt, params.max_new_tokens, f"prompt {row}")
    return Engine(model, sum(needs[:max_running]) * BLOCK, max_running=max_running).generate(
        prompts, params, on_token=on_token
    )


def check_prompt(config: ModelConfig, prompt: Sequence[int], max_new_tokens: int, name: str = "the prompt") -> None:
    """Raise ConfigError for a prompt that a model can't continue for so many tokens."""
    if not prompt:
        raise ConfigError(f"{name} is empty; it needs at least one token, such as the tokenizer's bos")
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise ConfigError(
                f"{name} has the token id {token}, but the model's vocabulary is 0 to "
                f"{config.vocab_size - 1}; encode it with the model's own tokenizer"
            )
    longest = config.max_position_embeddings
    if len(prompt) + max_new_tokens > longest and config.rope_scaling.kind == "default":
        raise ConfigError(
            f"{name} of {len(prompt)} tokens and max_new_tokens = {max_new_tokens} exceed "
            f"max_position_embeddings = {longest}; shorten one of them or set rope_scaling"
        )
