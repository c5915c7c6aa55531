"""Conversations to text and ids: the one place where a chat protocol is defined.

A protocol is a Jinja template, as exported tokenizers carry it, and the tokens that end an answer. What a user types
can't become a special token: `encode_chat` sees to it, by `typed`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ternlm.data.errors import DataError
from ternlm.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""


@dataclass(frozen=True)
class ChatProtocol:
    """How a family of models is spoken with."""

    template: str
    """Jinja, given `messages`, `add_generation_prompt`, `bos_token` and `eos_token`."""
    stop: tuple[str, ...]
    """Tokens that end an answer."""
    names: Mapping[int, str] = field(default_factory=dict)
    """What ids are called that the family's base tokenizer leaves unused."""

    def fit(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return the tokenizer with the protocol's tokens; raises DataError where it has no room for them."""
        lacks = [token for token in self.stop if token not in tokenizer.markup_in(token)]
        if not lacks:
            return tokenizer
        if not self.names or not all(
            index < tokenizer.vocab_size and "UNUSED" in tokenizer.token_of(index) for index in self.names
        ):
            raise DataError(
                f"the tokenizer has no {' and no '.join(lacks)}, with which the chat protocol ends an answer; choose "
                "the protocol that the model was trained with"
            )
        return tokenizer.renamed(self.names)


INTERNLM = ChatProtocol(
    template=(
        "{%- set turn = namespace(newest=0) -%}"
        "{%- for message in messages if message.role == 'user' -%}{%- set turn.newest = loop.index -%}{%- endfor -%}"
        "{%- set asked = namespace(count=0) -%}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}{%- set asked.count = asked.count + 1 -%}"
        # The text begins with <s>, and so does every turn of the past; not the newest.
        "{%- if loop.first or (asked.count > 1 and asked.count < turn.newest) -%}{{ '<s>' }}{%- endif -%}"
        "{{ '<|User|>:' + message.content + '<eoh>\n' }}"
        "{%- elif message.role == 'assistant' -%}{{ '<|Bot|>:' + message.content + '<eoa>\n' }}"
        "{%- elif message.role == 'system' and loop.first -%}{{ '<s><|System|>:' + message.content + '<eoh>\n' }}"
        "{%- else -%}{{ raise_exception('roles are system (first), user and assistant, not ' + message.role) }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|Bot|>:' }}{%- endif -%}"
    ),
    stop=("<eoa>", "</s>"),
)
"""InternLM chat (2023): `<s><|User|>:question<eoh>\\n<|Bot|>:answer<eoa>\\n`."""

INTERNLM2 = ChatProtocol(
    template=(
        "{{ bos_token }}{%- for message in messages -%}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    stop=("<|im_end|>", "</s>"),
    names={
        92538: "<|plugin|>",
        92539: "<|interpreter|>",
        92540: "<|action_end|>",
        92541: "<|action_start|>",
        92542: "<|im_end|>",
        92543: "<|im_start|>",
    },
)
"""InternLM2 chat: ChatML after `<s>`."""

PROTOCOLS = {"internlm": INTERNLM, "internlm2": INTERNLM2}


def render(
    template: str, messages: Sequence[Message], add_generation_prompt: bool = True, tokenizer: Tokenizer | None = None
) -> str:
    """Return the text of a conversation; raises DataError where the template refuses it, or isn't one."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    if tokenizer is not None:
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        tokens = {name: "" if index is None else tokenizer.token_of(index) for name, index in ids.items()}
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(f"message {number} must have a role and a content, both text; it is {dict(message)!r}")
    given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, "tools": None, **tokens}
    try:
        return _compiled(template).render(documents=None, **given)
    except Exception as trouble:  # a template may do anything wrong that Python can
        raise DataError(f"the chat template can't take this conversation ({trouble}); change its messages") from trouble


def encode_chat(
    tokenizer: Tokenizer, template: str, messages: Sequence[Message], add_generation_prompt: bool = True
) -> list[int]:
    """Return the ids of a conversation.

    Special tokens are those of the template alone: in what people typed, they are encoded as the plain text that they
    look like. Otherwise the ids are those of the whole text at once, as transformers gives them; a model's thoughts and
    calls of tools (<think>, <tool_call>) are tokens in its own turns. Raises DataError as `render`.
    """

    def rendered(conversation: Sequence[Message]) -> str:
        return render(template, conversation, add_generation_prompt, tokenizer)

    try:
        return tokenizer.chat_encoder.encode(messages, rendered, tokenizer.encode_markup)
    except DataError:
        raise
    except ValueError as trouble:
        raise DataError(str(trouble)) from trouble


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark what a model says, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # as the class above has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
