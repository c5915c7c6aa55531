"""Conversations to text and ids by a chat template, as a model is sent them; the protocols are `protocols`'.

What a user types can't become a special token: `encode_chat` sees to it, by `typed`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ternlm.data.errors import DataError
from ternlm.data.protocols import INTERNLM, INTERNLM2, PROTOCOLS, ChatProtocol
from ternlm.data.tokenizer import Tokenizer

__all__ = [
    "INTERNLM",
    "INTERNLM2",
    "PROTOCOLS",
    "ChatProtocol",
    "Message",
    "Tool",
    "encode_chat",
    "encode_rendered",
    "render",
]

Message = Mapping[str, Any]
"""`{"role": "system" | "user" | "assistant" | "tool", "content": text}`.

An assistant may call tools, and then have no content: `"tool_calls": [{"function": {"name", "arguments": {...}}}]`.
"""
Tool = Mapping[str, Any]
"""`{"type": "function", "function": {"name", "description", "parameters": a JSON schema}}`."""


def render(
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    tokenizer: Tokenizer | None = None,
    tools: Sequence[Tool] | None = None,
) -> str:
    """Return the text of a conversation; raises DataError where the template refuses it, or isn't one.

    So it does where the template leaves out the tools, or the calls of them: it isn't made for them.
    """
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    if tokenizer is not None:
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        tokens = {name: "" if index is None else tokenizer.token_of(index) for name, index in ids.items()}
    checked = [_checked(number, message) for number, message in enumerate(messages)]

    def text(messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools, **tokens}
        return _compiled(template).render(documents=None, **given)

    try:
        rendered = text(checked, list(tools) if tools else None)
    except Exception as trouble:  # a template may do anything wrong that Python can
        raise DataError(f"the chat template can't take this conversation ({trouble}); change its messages") from trouble
    calls = any(message.get("tool_calls") for message in checked)
    try:
        if tools and rendered == text(checked, None):
            raise DataError("the chat template leaves tools out; choose one that is made for them, or give no tools")
        if calls and rendered == text([{**message, "tool_calls": None} for message in checked], tools):
            raise DataError("the chat template leaves calls of tools out; choose one that is made for them")
    except DataError:
        raise
    except Exception:  # it can't do without them, so it doesn't leave them out
        return rendered
    return rendered


def _checked(number: int, message: Message) -> Message:
    """Return a message as templates take it: with a text as its content, arguments as objects."""
    calls, content = message.get("tool_calls"), message.get("content")
    if not isinstance(message.get("role"), str) or not (isinstance(content, str) or (content is None and calls)):
        raise DataError(f"message {number} must have a role and a content, both text; it is {dict(message)!r}")
    if not calls:
        return message
    return {**message, "content": content or "", "tool_calls": [_with_arguments(number, call) for call in calls]}


def _with_arguments(number: int, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a call of a tool with its arguments as an object, which OpenAI's interface writes as JSON."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise DataError(f"message {number} calls a tool by {call!r}; a call is an object with a function's name")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError as error:
        raise DataError(f"message {number} calls a tool with arguments that aren't JSON ({error})") from error
    function = {**function, "arguments": parsed}
    return {**call, "function": function} if "function" in call else function


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    tools: Sequence[Tool] | None = None,
) -> list[int]:
    """Return the ids of a conversation.

    Special tokens are those of the template alone: in what people typed, they are encoded as the plain text that they
    look like. Otherwise the ids are those of the whole text at once, as transformers gives them; a model's thoughts and
    calls of tools (<think>, <tool_call>) are tokens in its own turns. Raises DataError as `render`.
    """

    def rendered(conversation: Sequence[Message], tools: Sequence[Tool] | None) -> str:
        return render(template, conversation, add_generation_prompt, tokenizer, tools)

    return encode_rendered(tokenizer, messages, tools, rendered)


def encode_rendered(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    rendered: Callable[[Sequence[Message], Sequence[Tool] | None], str],
) -> list[int]:
    """Return the ids of the text that `rendered` makes of a conversation and tools, as `encode_chat` does."""
    # Tools travel as one more message: what they hold is typed too.
    typed = [*messages, {"role": "tools", "tools": list(tools)}] if tools else messages

    def render_typed(typed: Sequence[Message]) -> str:
        return rendered(typed[:-1], typed[-1]["tools"]) if tools else rendered(typed, None)

    try:
        return tokenizer.chat_encoder.encode(typed, render_typed, tokenizer.encode_markup)
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
