"""Talk with a model: a conversation that is kept, and an answer that streams. Screens and servers are for others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ternlm.config.section import ConfigError
from ternlm.convert.weights import OpenModel
from ternlm.data.chat import Message, encode_chat
from ternlm.data.errors import DataError
from ternlm.data.protocols import ChatProtocol, protocol_for
from ternlm.data.tokenizer import Tokenizer
from ternlm.infer.engine import generate
from ternlm.infer.params import SamplingParams
from ternlm.infer.text import TextStream, continue_encoded, stop_ids
from ternlm.model.decoder import CausalLM


@dataclass
class Chat:
    """A conversation with a model in memory."""

    model: CausalLM
    tokenizer: Tokenizer
    template: str
    params: SamplingParams
    """With the ids that end an answer."""
    messages: list[Message] = field(default_factory=list)

    def ask(self, text: str, write: Callable[[str], None]) -> str:
        """Answer, handing the answer to `write` piece by piece; both become part of the conversation.

        Where the answer is interrupted, or too little room is left for it (ConfigError), the conversation stays as it
        was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = encode_chat(self.tokenizer, self.template, messages)
        longest, dynamic = self.model.config.max_position_embeddings, self.model.config.rope_scaling.kind != "default"
        room = self.params.max_new_tokens if dynamic else min(self.params.max_new_tokens, longest - len(prompt))
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(prompt)} tokens, and the model was trained for {longest}; begin a new one"
            )
        stream, pieces = TextStream(self.tokenizer, prompt), []

        def tell(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        generate(
            self.model,
            [prompt],
            replace(self.params, max_new_tokens=room),
            on_token=lambda _row, token: tell(stream.add([token])),
        )
        tell(stream.finish())
        answer = "".join(pieces)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer


def start_chat(
    opened: OpenModel, model: CausalLM, params: SamplingParams, protocol: str | None = None, system: str | None = None
) -> Chat:
    """Begin a conversation with an opened model, whose weights are in `model`.

    protocol: a name of `PROTOCOLS` or a template's file; the model's own if not given.
    params: the ids that end an answer are added.
    Raises ConfigError where the model has no tokenizer or no protocol.
    """
    try:
        dialect = find_dialect(opened, protocol)
    except NoDialect as error:
        raise ConfigError(f"{error}, or let it continue a text with `tern generate`") from error
    messages = [] if system is None else [{"role": "system", "content": system}]
    params = replace(params, stop_ids=params.stop_ids | dialect.stop_ids)
    return Chat(model, dialect.tokenizer, dialect.template, params, list[Message](messages))


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
