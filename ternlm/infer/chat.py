"""Talk with a model: conversations in, answers that stream. Screens and servers are for others."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ternlm.config.section import ConfigError, UserError
from ternlm.convert.weights import OpenModel
from ternlm.data.chat import Message, encode_chat
from ternlm.data.errors import DataError
from ternlm.data.protocols import ChatProtocol, protocol_for
from ternlm.data.tokenizer import Tokenizer
from ternlm.infer.engine import Engine
from ternlm.infer.params import SamplingParams
from ternlm.infer.sampling import NOT_FINITE, make_generator
from ternlm.infer.text import TextStream, continue_encoded, stop_ids
from ternlm.model.decoder import CausalLM


class Chat:
    """A model that answers conversations. What it has read of one is kept, so that its next answer begins soon."""

    def __init__(self, model: CausalLM, dialect: "Dialect", params: SamplingParams, num_tokens: int) -> None:
        """params: as answers are drawn, with the ids that end them. num_tokens: of a conversation, that there is room
        for."""
        self.tokenizer, self.template, self.params = dialect.tokenizer, dialect.template, params
        self._engine = Engine(model, num_tokens, max_running=1)
        self._times: Counter[tuple[int, ...]] = Counter()

    def answer(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the answer to what a user said last, piece by piece; closing the iterator ends it.

        The same conversation is answered otherwise each time, unless the temperature is 0. Raises ConfigError where
        too little room is left for an answer, DataError where the template refuses the conversation, UserError where
        logits aren't finite.
        """
        params = params or self.params
        prompt = encode_chat(self.tokenizer, self.template, messages)
        longest = self._engine.longest
        room = min(params.max_new_tokens, longest - len(prompt))
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(prompt)} tokens, and there is room for {longest}; begin a new one"
            )
        generator = make_generator(params.seed, prompt, self._times[tuple(prompt)])
        self._times[tuple(prompt)] += 1
        request = self._engine.add(prompt, replace(params, max_new_tokens=room), generator=generator)
        stream = TextStream(self.tokenizer, prompt)
        try:
            while self._engine.is_busy:
                for event in self._engine.step():
                    if event.finish == "error":
                        raise UserError(NOT_FINITE)
                    if event.token is not None and (piece := stream.add([event.token])):
                        yield piece
            if rest := stream.finish():
                yield rest
        finally:
            self._engine.cancel(request)


def start_chat(
    opened: OpenModel,
    model: CausalLM,
    params: SamplingParams,
    protocol: str | None = None,
    num_tokens: int | None = None,
) -> Chat:
    """Chat with an opened model, whose weights are in `model`.

    protocol: a name of `PROTOCOLS` or a template's file; the model's own if not given.
    params: the ids that end an answer are added. num_tokens: that there is to be room for; the model's own length if
    not given.
    Raises ConfigError where the model has no tokenizer or no protocol.
    """
    try:
        dialect = find_dialect(opened, protocol)
    except NoDialect as error:
        raise ConfigError(f"{error}, or let it continue a text with `tern generate`") from error
    params = replace(params, stop_ids=params.stop_ids | dialect.stop_ids)
    return Chat(model, dialect, params, num_tokens or model.config.max_position_embeddings)


class NoDialect(ConfigError):
    """It isn't known how one chats with a model."""


@dataclass(frozen=True)
class Dialect:
    """How one chats with a model."""

    tokenizer: Tokenizer
    """In which the protocol's tokens have their names."""
    template: str
    stop_ids: frozenset[int]
    """What ends an answer."""


def find_dialect(opened: OpenModel, protocol: str | None = None) -> Dialect:
    """Find how one chats with an opened model, protocol as for `start_chat`.

    Raises NoDialect where nothing tells, ConfigError where the model has no tokenizer.
    """
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{opened.path}: has no tokenizer, without which nobody can chat; put a tokenizer.json there")
    try:
        chosen = protocol_of(opened, tokenizer, protocol or "auto")
    except DataError as error:
        raise NoDialect(f"{opened.path}: {error}") from error
    tokenizer = chosen.fit(tokenizer)
    ends = {tokenizer.id_of(token) for token in chosen.stop}
    return Dialect(tokenizer, chosen.template, frozenset(ends | stop_ids(tokenizer)))


def protocol_of(opened: OpenModel, tokenizer: Tokenizer, chat: str = "auto") -> ChatProtocol:
    """Find how one chats with an opened model, as `protocol_for` does; its own template ends answers as it tells."""
    own = opened.facts.get("chat_template")
    told = (end for end in told_ends(opened.facts) if 0 <= end < tokenizer.vocab_size)
    return protocol_for(chat, tokenizer, own and str(own), {tokenizer.token_of(end) for end in told})


def answer_texts(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: str,
    conversations: Sequence[Sequence[Message]],
    params: SamplingParams,
) -> list[str]:
    """Return a model's answer to each conversation, which ends with what a user says."""
    prompts = [encode_chat(tokenizer, template, messages) for messages in conversations]
    return continue_encoded(model, tokenizer, prompts, params)


def told_ends(facts: Mapping[str, Any]) -> set[int]:
    """Return the ids that end an answer, as the model's generation settings tell them."""
    told = facts.get("generation", {}).get("eos_token_id")
    return set(told) if isinstance(told, list) else set() if told is None else {int(told)}
