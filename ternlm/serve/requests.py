"""What clients may ask for: the bodies of requests, as pydantic checks them. Unknown fields are errors."""

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ternlm.config.section import Section, setting
from ternlm.infer.params import MAX_LOGPROBS

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
# A list of a million wrong entries is told of by its first one: a list of its faults would take gigabytes.
Tokens = Annotated[list[TokenId], Field(fail_fast=True)]
Stops = Annotated[list[Stop], Field(fail_fast=True, max_length=16)]
_MOST_FIELDS = 1024


class Body(Section):
    """What a request brings."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_breaks(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given  # refused by its type
        for name, value in [("the body", given), *given.items()]:
            if isinstance(value, dict) and len(value) > _MOST_FIELDS:
                raise ValueError(f"{name[:40]} has {len(value):,} fields; {_MOST_FIELDS:,} are the most")
        try:
            json.dumps(given, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("the body holds half a character (a lone surrogate); send whole ones") from error
        return given


class StreamOptions(Section):
    """What a stream tells beside the text."""

    include_usage: bool | None = setting(None, "a last chunk tells how many tokens there were")
    include_obfuscation: Literal[False] | None = setting(None, "only false")


class Continuation(Body):
    """What the two ways to continue a text have in common."""

    model: str = setting(..., "as /v1/models names it")
    max_tokens: int | None = setting(None, "longest continuation", unit="tokens", ge=0)
    n: int | None = setting(None, "texts for each prompt", ge=1, le=128)
    temperature: float | None = setting(None, "0: always the most likely token", ge=0, le=2)
    top_p: float | None = setting(None, "choose among the most likely tokens of this total share", gt=0, le=1)
    top_k: int | None = setting(None, "choose among so many most likely tokens; 0 or -1: all", ge=-1, lt=2**31)
    min_p: float | None = setting(None, "leave out tokens below this share of the likeliest one's", ge=0, le=1)
    presence_penalty: float | None = setting(None, "taken off the logits of tokens that were said", ge=-2, le=2)
    frequency_penalty: float | None = setting(None, "taken off for each time a token was said", ge=-2, le=2)
    repetition_penalty: float | None = setting(None, "above 1: what was said is less likely", ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = setting(
        None, "token ids, and what is added to their logits", max_length=1024
    )
    seed: int | None = setting(None, "the same seed gives the same text", ge=-(2**63), lt=2**63)
    stop: Stop | Stops | None = setting(None, "strings that end the text")
    stop_token_ids: Annotated[Tokens, Field(max_length=128)] | None = setting(None, "tokens that end the text")
    min_tokens: int | None = setting(None, "so many tokens come before an end may", ge=0)
    ignore_eos: bool | None = setting(None, "the model's own end tokens don't end the text")
    stream: bool | None = setting(None, "send the text as it comes, as server-sent events")
    stream_options: StreamOptions | None = setting(None, "with stream alone")
    user: str | None = setting(None, "taken, not used")
    metadata: dict[str, str] | None = setting(None, "taken, not used")

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        wrong = next((key for key in bias or () if not (key.isascii() and key.isdecimal() and len(key) < 10)), None)
        if wrong is not None:
            raise ValueError(f"{wrong[:20]!r} must be a token id")
        return bias

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has no effect without stream; set stream or leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the text."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Continuation):
    """A text to be continued, or several."""

    prompt: str | Tokens | Annotated[list[str | Tokens], Field(fail_fast=True, min_length=1, max_length=2048)] = (
        setting(..., "a text, its token ids, or a list of either")
    )
    echo: bool | None = setting(None, "the prompt is part of the answer")
    logprobs: int | None = setting(None, "tell so many of the likeliest tokens", ge=0, le=MAX_LOGPROBS)
    suffix: None = setting(None, "only null")
    best_of: Literal[1] | None = setting(None, "only 1")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]


class Function(Section):
    """What a model may call."""

    name: str = setting(..., "letters, digits, _ and -, 64 at most")
    description: str | None = setting(None, "what it is for")
    parameters: dict[str, Any] | None = setting(None, "a JSON schema")
    strict: bool | None = setting(None, "calls that are asked for keep to the schema in any case")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("must be letters, digits, _ and -, at least 1 and at most 64")
        return name


class ToolEntry(Section):
    """A function, as a tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(Section):
    """The name of a function."""

    name: str


class NamedTool(Section):
    """The one function that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Section):
    """A call that was made."""

    name: str
    arguments: str = setting("{}", "JSON")


class Call(Section):
    """A call that was made, by its id."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class TextPart(Section):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Section):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = setting(None, "taken, not used")
    tool_calls: Annotated[list[Call], Field(fail_fast=True)] | None = setting(None, "of an assistant")
    tool_call_id: str | None = setting(None, "of a tool's result")
    refusal: str | None = setting(None, "taken, not used")
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = setting(None, "taken, not used")

    @field_validator("content", mode="before")
    @classmethod
    def _refuse_media(cls, content: Any) -> Any:
        if isinstance(content, list):
            kinds = [part.get("type") for part in content if isinstance(part, dict)]
            other = next((kind for kind in kinds if isinstance(kind, str) and kind != "text"), None)
            if other is not None:
                raise ValueError(f"parts of type {other[:40]!r} aren't taken, and nothing is fetched; send text")
        return content

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are an assistant's, not of the role {self.role}")
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the role {self.role} needs a content")
        return self


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)]
Tools = Annotated[list[ToolEntry], Field(fail_fast=True, max_length=128)]


class JsonSchema(Section):
    """A schema that the answer keeps to."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = setting(..., "a JSON schema", alias="schema")
    strict: bool | None = setting(None, "the answer keeps to the schema in any case")


class ResponseFormat(Section):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema stands with the type json_schema, and only there")
        return self


class ChatRequest(Continuation):
    """A conversation to be answered."""

    messages: Messages = setting(..., "the conversation")
    max_completion_tokens: int | None = setting(None, "another name of max_tokens", ge=0)
    logprobs: bool | None = setting(None, "tell how likely each token was")
    top_logprobs: int | None = setting(None, "tell so many of the likeliest tokens", ge=0, le=MAX_LOGPROBS)
    tools: Tools | None = setting(None, "functions that the model may call")
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = setting(None, "whether it calls any")
    parallel_tool_calls: bool | None = setting(None, "false: one call, where one is asked for")
    response_format: ResponseFormat | None = setting(None, "JSON, or what keeps to a schema")
    store: Literal[False] | None = setting(None, "only false")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs; set it to true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are one setting; give one of them")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice asks for a call, but there are no tools")
        return self


class TokenizeRequest(Body):
    """A text or a conversation to be encoded."""

    model: str | None = None
    prompt: str | None = setting(None, "a text")
    add_special_tokens: bool | None = setting(None, "with the token that begins a document, by default")
    messages: Messages | None = setting(None, "a conversation")
    tools: Tools | None = setting(None, "with messages alone")
    add_generation_prompt: bool | None = setting(None, "up to where the model's answer begins, by default")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """Token ids to be decoded."""

    model: str | None = None
    tokens: Tokens = setting(..., "token ids", max_length=2**20)
