"""From what a client asks for to jobs for a backend; what can't be served is refused here, with a reason."""

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ternlm.config.section import ConfigError
from ternlm.data.chat import encode_chat
from ternlm.infer.params import SamplingParams
from ternlm.infer.text import encode_prompt
from ternlm.serve.backend import Job, ServedModel
from ternlm.serve.errors import ApiError
from ternlm.serve.grammar import grammar_of_calls, grammar_of_format
from ternlm.serve.requests import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Continuation,
    Function,
    NamedTool,
    ToolEntry,
)
from ternlm.serve.tool_calls import ToolFormat, format_of

_USUAL_COMPLETION = 16
"""Tokens of a completion where nothing is said, as OpenAI has it."""


@dataclass(frozen=True)
class Checked:
    """Jobs, and what is to be made of their answers."""

    jobs: list[Job]
    prompts: list[tuple[int, ...]]
    """Each once."""
    tool_format: ToolFormat | None = None
    """How calls are written, if they are looked for."""


def check_model(served: ServedModel, name: str | None) -> None:
    """Raise ApiError for a model that isn't here."""
    if name is not None and name != served.name:
        message = f"there is no model {name[:100]!r} here; there is {served.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def check_completion(served: ServedModel, request: CompletionRequest) -> Checked:
    """Return the jobs of /v1/completions. Raises ApiError or UserError."""
    tokenizer = served.tokenizer
    prompts = [tuple(encode_prompt(tokenizer, each) if isinstance(each, str) else each) for each in request.prompts]
    if request.max_tokens == 0 and not request.echo:
        raise ApiError(400, "max_tokens = 0 gives nothing without echo; set it to 1 at least", param="max_tokens")
    wanted = _USUAL_COMPLETION if request.max_tokens is None else max(request.max_tokens, 1)
    exact = request.max_tokens is not None
    jobs = _jobs(
        served,
        request,
        prompts,
        [_room(served, prompt, wanted, exact, "max_tokens") for prompt in prompts],
        logprobs=request.logprobs,
        ends=served.stop_ids,
        wants_prompt=bool(request.echo) and request.logprobs is not None,
    )
    return Checked(jobs, prompts)


def check_chat(served: ServedModel, request: ChatRequest) -> Checked:
    """Return the jobs of /v1/chat/completions. Raises ApiError or UserError."""
    functions = [tool.function for tool in request.tools or ()]
    calls = bool(functions) and request.tool_choice != "none"
    prompt = encode_messages(served, request.messages, request.tools if calls else None)
    assert served.dialect is not None  # `encode_messages` has seen to it
    form = format_of(served.dialect.template) if calls else None
    grammar = grammar_of_format(request.response_format)
    if calls and grammar:
        message = "response_format leaves no calls of tools; give one of them, or set tool_choice to none"
        raise ApiError(400, message, param="response_format")
    if calls and request.tool_choice not in (None, "auto"):
        grammar = _forced(served, request, form, functions)
    if grammar and (request.ignore_eos or request.min_tokens):
        raise ApiError(400, "ignore_eos and min_tokens have no place where the answer keeps to a grammar")
    most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if most == 0:
        raise ApiError(400, "max_tokens = 0 gives no answer; set it to 1 at least", param="max_tokens")
    room = _room(served, prompt, most or served.max_tokens, most is not None, "max_tokens")
    jobs = _jobs(
        served,
        request,
        [prompt],
        [room],
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        ends=served.dialect.stop_ids,
        shown=form.marks(served.tokenizer) if form else (),
        grammar=grammar,
    )
    return Checked(jobs, [prompt], form)


def encode_messages(
    served: ServedModel, messages: Sequence[ChatMessage], tools: Sequence[ToolEntry] | None, answered: bool = True
) -> tuple[int, ...]:
    """Return the ids of a conversation, up to where an answer begins if it is to be `answered`."""
    if served.dialect is None:
        raise ApiError(400, f"{served.why_not}; /v1/completions continues texts", code="no_chat")
    told = [_as_told(message) for message in messages]
    entries = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools or ()]
    ids = encode_chat(served.tokenizer, served.dialect.template, told, answered, entries or None)
    return tuple(ids)


def _as_told(message: ChatMessage) -> dict[str, Any]:
    """Return a message as templates take it."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    told: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content,
    }
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": call.id, "type": "function", "function": call.function.model_dump()} for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    return told


def _forced(served: ServedModel, request: ChatRequest, form: ToolFormat | None, functions: list[Function]) -> str:
    """Return the grammar of the calls that a client asks for."""
    if form is None:
        message = "it isn't known how this model writes calls, so that none can be asked for; set tool_choice to auto"
        raise ApiError(400, message, param="tool_choice")
    choice, several = request.tool_choice, request.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        name, several = choice.function.name, False
        functions = [function for function in functions if function.name == name]
        if not functions:
            message = f"tool_choice names {name[:64]!r}, which is none of the tools"
            raise ApiError(400, message, param="tool_choice")
    return grammar_of_calls(form, served.tokenizer, functions, several)


def _room(served: ServedModel, prompt: Sequence[int], wanted: int, exact: bool, param: str) -> int:
    """Return how long a continuation may become; raises ApiError where what is wanted doesn't fit."""
    room = served.max_tokens - len(prompt)
    if room < 1 or (exact and wanted > room):
        more = f" and {param} = {wanted}" if exact else ""
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens{more}, and the model takes {served.max_tokens} in all; shorten it",
            param=param if exact and room >= 1 else None,
            code="context_length_exceeded",
        )
    return min(wanted, room)


def _jobs(
    served: ServedModel,
    request: Continuation,
    prompts: Sequence[tuple[int, ...]],
    rooms: Sequence[int],
    *,
    logprobs: int | None,
    ends: frozenset[int],
    shown: tuple[int, ...] = (),
    grammar: str | None = None,
    wants_prompt: bool = False,
) -> list[Job]:
    num = request.n or 1
    if num * len(prompts) > served.max_jobs:
        texts = f"{len(prompts)} prompts with n = {num}"
        raise ApiError(400, f"{texts} are more texts than the {served.max_jobs} that may wait; send fewer", param="n")
    seed = secrets.randbits(63) if request.seed is None else request.seed
    times: Counter[tuple[int, ...]] = Counter()
    jobs = []
    for prompt, room in zip(prompts, rooms, strict=True):
        params = _params(served, request, room, seed, logprobs, ends)
        for _ in range(num):
            jobs.append(Job(prompt, params, request.stops, shown, times[prompt], grammar, wants_prompt))
            times[prompt] += 1
    return jobs


def _params(
    served: ServedModel, request: Continuation, room: int, seed: int, logprobs: int | None, ends: frozenset[int]
) -> SamplingParams:
    own = frozenset(request.stop_token_ids or ())
    if any(token >= served.vocab_size for token in own):
        raise ConfigError(f"stop_token_ids must be of the vocabulary, 0 to {served.vocab_size - 1}; leave others out")
    least = request.min_tokens or 0
    if least > room:
        message = f"min_tokens = {least} is more than the {room} that there may be at most; lower it"
        raise ApiError(400, message, param="min_tokens")
    return SamplingParams(
        max_new_tokens=room,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=tuple((int(key), value) for key, value in (request.logit_bias or {}).items()),
        seed=seed,
        stop_ids=own if request.ignore_eos else own | ends,
        min_new_tokens=least,
        logprobs=logprobs,
    )
