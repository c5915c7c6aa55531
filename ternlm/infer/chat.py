"""Talk with a model: a conversation that is kept, and an answer that streams. Screens and servers are for others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ternlm.config.section import ConfigError
from ternlm.convert.weights import OpenModel
from ternlm.data.chat import PROTOCOLS, ChatProtocol, Message, encode_chat
from ternlm.data.tokenizer import Tokenizer
from ternlm.infer.generate import generate
from ternlm.infer.sampling import SamplingParams
from ternlm.infer.text import TextStream, stop_ids
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

    protocol: a name of `PROTOCOLS`; the model's own if not given. params: the ids that end an answer are added.
    Raises ConfigError where the model has no tokenizer or no protocol.
    """
    tokenizer, own = opened.tokenizer, opened.facts.get("chat_template")
    if tokenizer is None:
        raise ConfigError(f"{opened.path}: has no tokenizer, without which nobody can chat; put a tokenizer.json there")
    chosen = PROTOCOLS[protocol] if protocol else None
    if chosen is None and not own:
        chosen = _fitting(tokenizer)
    if chosen is None and not own:
        raise ConfigError(
            f"{opened.path}: doesn't tell how it was trained to chat; choose a protocol, {' or '.join(PROTOCOLS)}, or "
            "let it continue a text with `tern generate`"
        )
    if chosen is not None:
        tokenizer = chosen.fit(tokenizer)
        ends = {tokenizer.id_of(token) for token in chosen.stop}
    else:
        ends = told_ends(opened.facts)
    messages = [] if system is None else [{"role": "system", "content": system}]
    template = chosen.template if chosen else str(own)
    params = replace(params, stop_ids=params.stop_ids | ends | stop_ids(tokenizer))
    return Chat(model, tokenizer, template, params, list[Message](messages))


def answer_texts(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: str,
    conversations: Sequence[Sequence[Message]],
    params: SamplingParams,
) -> list[str]:
    """Return a model's answer to each conversation, which ends with what a user says."""
    prompts = [encode_chat(tokenizer, template, messages) for messages in conversations]
    answers = []
    for prompt, tokens in zip(prompts, generate(model, prompts, params), strict=True):
        stream = TextStream(tokenizer, prompt)
        answers.append(stream.add(tokens) + stream.finish())
    return answers


def told_ends(facts: Mapping[str, Any]) -> set[int]:
    """Return the ids that end an answer, as the model's generation settings tell them."""
    told = facts.get("generation", {}).get("eos_token_id")
    return set(told) if isinstance(told, list) else set() if told is None else {int(told)}


def _fitting(tokenizer: Tokenizer) -> ChatProtocol | None:
    """Return the protocol whose end token the tokenizer has."""
    return next((p for p in PROTOCOLS.values() if p.stop[0] in tokenizer.markup_in(p.stop[0])), None)
