"""Whatever is wrong with a request, the answer is a 4xx that says so in OpenAI's shape, and the server goes on."""

import json

import pytest
from pydantic import ValidationError

from ternlm.serve.requests import ChatRequest, CompletionRequest, DetokenizeRequest

ASK = [{"role": "user", "content": "hi"}]
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f"}}


def deep(depth):
    return json.loads('{"a":' * depth + "1" + "}" * depth)


CHAT_FAULTS = {
    "no messages": {"messages": []},
    "messages that are none": {"messages": "hi"},
    "a message that is none": {"messages": ["hi"]},
    "no role": {"messages": [{"content": "hi"}]},
    "an unknown role": {"messages": [{"role": "king", "content": "hi"}]},
    "no content": {"messages": [{"role": "user"}]},
    "null content": {"messages": [{"role": "user", "content": None}]},
    "a number as content": {"messages": [{"role": "user", "content": 3}]},
    "a picture": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
    "a sound": {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    "a part without a type": {"messages": [{"role": "user", "content": [{"text": "hi"}]}]},
    "calls of a user": {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
    "arguments that aren't JSON": {
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    },
    "half a character": {"messages": [{"role": "user", "content": "\ud800"}]},
    "a field of a message": {"messages": [{"role": "user", "content": "x", "colour": "red"}]},
    "a template": {"chat_template": "{{ messages }}"},
    "an unknown field": {"temprature": 1},
    "temperature as text": {"temperature": "0"},
    "temperature below 0": {"temperature": -1},
    "temperature NaN": {"temperature": float("nan")},
    "temperature infinite": {"temperature": float("inf")},
    "top_p 0": {"top_p": 0},
    "top_k -2": {"top_k": -2},
    "top_k huge": {"top_k": 2**70},
    "min_p 2": {"min_p": 2},
    "n 0": {"n": 0},
    "n huge": {"n": 10**9},
    "more texts than may wait": {"n": 128},
    "max_tokens 0": {"max_tokens": 0},
    "max_tokens below 0": {"max_tokens": -1},
    "max_tokens half": {"max_tokens": 1.5},
    "more tokens than fit": {"max_tokens": 10**6},
    "two names of one setting": {"max_tokens": 3, "max_completion_tokens": 4},
    "a conversation that is too long": {"messages": [{"role": "user", "content": "far " * 3000}]},
    "min_tokens beyond max_tokens": {"max_tokens": 3, "min_tokens": 4},
    "a seed that is none": {"seed": "x"},
    "a seed too large": {"seed": 2**64},
    "an empty stop string": {"stop": ""},
    "a list with an empty stop string": {"stop": ["a", ""]},
    "many stop strings": {"stop": ["a"] * 50},
    "stop tokens outside the vocabulary": {"stop_token_ids": [10**8]},
    "stop tokens below 0": {"stop_token_ids": [-1]},
    "a bias of no token": {"logit_bias": {"x": 1}},
    "a bias outside the vocabulary": {"logit_bias": {"99999999": 1}},
    "a bias too large": {"logit_bias": {"5": 1000}},
    "a bias of other digits": {"logit_bias": {"²": 1}},
    "a penalty too large": {"presence_penalty": 3},
    "a repetition penalty of 0": {"repetition_penalty": 0},
    "top_logprobs without logprobs": {"top_logprobs": 2},
    "too many logprobs": {"logprobs": True, "top_logprobs": 21},
    "logprobs as a number": {"logprobs": 2},
    "options of no stream": {"stream_options": {"include_usage": True}},
    "an unknown option of a stream": {"stream": True, "stream_options": {"x": 1}},
    "stream as text": {"stream": "yes"},
    "a tool that is none": {"tools": [{"type": "web"}]},
    "a tool without a name": {"tools": [{"type": "function", "function": {}}]},
    "a tool's name": {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    "a tool's schema": {"tools": [{**TOOL, "function": {"name": "f", "parameters": []}}]},
    "many tools": {"tools": [TOOL] * 200},
    "a choice without tools": {"tool_choice": "required"},
    "a choice of none of the tools": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    "an unknown choice": {"tools": [TOOL], "tool_choice": "perhaps"},
    "an unknown form": {"response_format": {"type": "xml"}},
    "a form without its schema": {"response_format": {"type": "json_schema"}},
    "a deep schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": deep(900)}}}
    },
    "a deep tool": {"tools": [{**TOOL, "function": {"name": "f", "parameters": deep(900)}}]},
    "a tool whose schema is wrong": {
        "tools": [{**TOOL, "function": {"name": "f", "parameters": {"type": "nothing"}}}],
        "tool_choice": "required",
    },
    "a form and tools": {"tools": [TOOL], "response_format": {"type": "json_object"}},
    "a form that can't end": {"response_format": {"type": "json_object"}, "ignore_eos": True},
    "another model": {"model": "other"},
    "a model that is none": {"model": 5},
}
COMPLETION_FAULTS = {
    "no prompt": {"prompt": None},
    "an empty list": {"prompt": []},
    "an empty list of tokens": {"prompt": [[]]},
    "tokens and texts": {"prompt": [1, "a"]},
    "tokens outside the vocabulary": {"prompt": [10**8]},
    "tokens below 0": {"prompt": [-1]},
    "tokens that are no integers": {"prompt": [1.5]},
    "a true token": {"prompt": [True]},
    "half a character": {"prompt": "\ud83d"},
    "an object": {"prompt": {"a": 1}},
    "many prompts": {"prompt": ["a"] * 1000},
    "logprobs below 0": {"logprobs": -1},
    "logprobs beyond the most": {"logprobs": 21},
    "logprobs true": {"logprobs": True},
    "a suffix": {"suffix": "x"},
    "the best of two": {"best_of": 2},
    "nothing wanted": {"max_tokens": 0},
    "no room left": {"prompt": [5] * 512},
    "messages": {"messages": ASK},
}
BODIES = {
    "nothing": b"",
    "half of JSON": b'{"model": "tiny", "messages": [',
    "other bytes": b"\xff\xfe\x00",
    "a list": b"[]",
    "null": b"null",
    "a text": b'"hi"',
    "a number of many digits": b'{"model": "tiny", "messages": [], "seed": ' + b"9" * 5000 + b"}",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
}


MANY = 100_000
CROWDS = {
    "prompts": (CompletionRequest, {"prompt": [1.5] * MANY}),
    "messages": (ChatRequest, {"messages": [{}] * 4000}),
    "parts": (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    "calls": (ChatRequest, {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}] * MANY}]}),
    "stop strings": (ChatRequest, {"messages": ASK, "stop": [1] * MANY}),
    "stop tokens": (ChatRequest, {"messages": ASK, "stop_token_ids": ["1"] * MANY}),
    "tools": (ChatRequest, {"messages": ASK, "tools": [{}] * 128}),
    "biases": (ChatRequest, {"messages": ASK, "logit_bias": {f"x{i}": "a" for i in range(MANY)}}),
    "metadata": (ChatRequest, {"messages": ASK, "metadata": {f"x{i}": 1 for i in range(MANY)}}),
    "fields": (ChatRequest, {"messages": ASK, **{f"x{i}": 1 for i in range(MANY)}}),
    "tokens": (DetokenizeRequest, {"tokens": ["1"] * MANY}),
}


def check(answer):
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10
    assert error["type"]
    return error


def post(http, path, content):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return http.post(path, content=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("fault", CHAT_FAULTS.values(), ids=CHAT_FAULTS)
def test_a_faulty_conversation_is_refused(http, fault):
    check(post(http, CHAT, {"model": "tiny", "messages": ASK, "max_tokens": 2, **fault}))


@pytest.mark.parametrize("fault", COMPLETION_FAULTS.values(), ids=COMPLETION_FAULTS)
def test_a_faulty_completion_is_refused(http, fault):
    check(post(http, COMPLETE, {"model": "tiny", "prompt": "a", "max_tokens": 2, **fault}))


@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_none_is_refused(http, path, body):
    check(post(http, path, body))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", ""])
@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/tokenize", "/detokenize"])
def test_a_body_that_is_not_sent_as_json_is_refused(http, path, kind):
    body = json.dumps({"model": "tiny", "prompt": "a", "messages": ASK, "tokens": [1]}).encode()
    check(http.post(path, content=body, headers={"Content-Type": kind}))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": ASK}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "\ud800"}),
        ("/tokenize", {"prompt": "a", "model": "other"}),
        ("/detokenize", {"tokens": [10**8]}),
        ("/detokenize", {"tokens": "abc"}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
def test_faulty_tokens_and_texts_are_refused(http, path, body):
    check(post(http, path, body))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/models/other", 404),
        ("POST", "/v1/models", 405),
        ("DELETE", CHAT, 405),
        ("GET", COMPLETE, 405),
        ("OPTIONS", CHAT, 405),
    ],
)
def test_other_paths_and_methods_are_refused(http, method, path, status):
    answer = http.request(method, path)
    assert answer.status_code == status
    check(answer)
    assert "access-control-allow-origin" not in answer.headers


def test_the_field_that_is_wrong_is_named(http):
    error = check(post(http, CHAT, {"model": "tiny", "messages": ASK, "temperature": 9}))
    assert error["param"] == "temperature"
    assert "temperature" in error["message"]
    error = check(post(http, CHAT, {"model": "tiny", "messages": ASK, "colour": 9}))
    assert error["message"] == "colour: is not known here; leave it out"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (COMPLETE, {"prompt": "x", "stop": [""]}, "stop.0: String should have at least 1 character"),
        (COMPLETE, {"prompt": "x", "stop": 5}, "stop: Input should be a valid string"),
        (COMPLETE, {"prompt": [1, "a"]}, "prompt.1: Input should be a valid integer"),
        (COMPLETE, {"prompt": [[1, -2]]}, "prompt.0.1: Input should be greater than or equal to 0"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text: Field required",
        ),
        (CHAT, {}, "messages: Field required"),
        (CHAT, {"messages": ASK, "n": 0, "top_p": 3}, "n: Input should be greater than or equal to 1 (and 1 more)"),
    ],
)
def test_the_place_that_is_wrong_is_told_without_the_types_that_were_tried(http, path, body, message):
    error = check(post(http, path, {"model": "tiny", **body}))
    assert error["message"] == message
    assert error["param"] == message.split(":")[0]


@pytest.mark.parametrize(("kind", "body"), CROWDS.values(), ids=CROWDS)
def test_of_many_faults_the_first_are_told(kind, body):
    """A list of all would take gigabytes, and the server's time."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "tiny", **body})
    assert caught.value.error_count() < 10


def test_after_all_of_it_the_server_is_as_before(http, server):
    assert http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    assert server.is_free()
    answer = http.post(COMPLETE, json={"model": "tiny", "prompt": "a", "max_tokens": 3})
    assert answer.status_code == 200
