"""What the server answers is what the engine says: the same tokens, probabilities and texts, streamed or not."""

import json
from importlib.util import find_spec

import pytest
import torch
from chats import tokenizer_for
from in_memory import greedy
from served import events_of, serving, wait_until

from ternlm.data.chat import encode_chat
from ternlm.data.protocols import CHATML, INTERNLM2
from ternlm.infer.engine import generate
from ternlm.ops.attention import make_segment_attend

ASK = [{"role": "user", "content": "Where does the tern fly? 燕鸥"}]
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


def chat(http, **more):
    answer = http.post(CHAT, json={"model": "tiny", "messages": ASK, "max_tokens": 24, **more})
    assert answer.status_code == 200, answer.text
    return answer


def complete(http, **more):
    answer = http.post(COMPLETE, json={"model": "tiny", "prompt": "The tern", "max_tokens": 24, **more})
    assert answer.status_code == 200, answer.text
    return answer


def texts(answer):
    return [choice["text"] for choice in answer.json()["choices"]]


def test_a_greedy_answer_is_what_the_engine_generates(server, http):
    prompt = encode_chat(server.tokenizer, CHATML.template, ASK)
    ends = [server.tokenizer.id_of("<|im_end|>")]
    (tokens,) = generate(server.model, [prompt], greedy(24, ends))
    assert chat(http, temperature=0).json()["choices"][0]["message"]["content"] == server.tokenizer.decode(tokens)
    (tokens,) = generate(server.model, [[5, 6, 7]], greedy(24, ends))
    assert texts(complete(http, prompt=[5, 6, 7], temperature=0)) == [server.tokenizer.decode(tokens)]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"seed": 3, "n": 3},
        {"seed": 3, "top_p": 0.9, "top_k": 50, "frequency_penalty": 1.0, "min_tokens": 3},
        {"seed": 1, "logprobs": True, "top_logprobs": 2},
        {"temperature": 0, "stop": ["a", "e", "燕"]},
        {"seed": 1, "max_tokens": 1},
    ],
    ids=json.dumps,
)
def test_a_stream_tells_what_the_whole_answer_has(http, settings):
    whole = chat(http, **settings).json()
    chunks = events_of(chat(http, stream=True, stream_options={"include_usage": True}, **settings).text)
    usage = whole["usage"] | {"prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]}
    assert chunks[-1]["usage"] == usage
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        entries = [entry for c in own for entry in (c["logprobs"] or {}).get("content", [])]
        assert entries == ((choice["logprobs"] or {}).get("content") or [])


@pytest.mark.parametrize("settings", [{}, {"echo": True}, {"echo": True, "max_tokens": 0}], ids=str)
def test_a_streamed_completion_tells_what_the_whole_one_has(http, settings):
    settings = {"prompt": ["The tern", "燕鸥"], "seed": 2, "n": 2, "logprobs": 2, **settings}
    whole = complete(http, **settings).json()
    chunks = events_of(complete(http, stream=True, **settings).text)
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            told = [value for c in own for value in c["logprobs"][name]]
            assert json.dumps(told) == json.dumps(values)


def test_the_scores_of_a_prompt_are_those_of_a_full_forward_pass(server, http):
    prompt = [11, 300, 301, 17, 18, 19, 200, 201]
    choice = complete(http, prompt=prompt, echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
    attend = make_segment_attend([[len(prompt)]], torch.device("cpu"))
    with torch.no_grad():
        hidden = server.model(torch.tensor([prompt]), torch.arange(len(prompt))[None], attend, 0)
        scores = server.model.lm_head(hidden)[0].log_softmax(-1)
    expected = [float(scores[i, token]) for i, token in enumerate(prompt[1:])]
    told = choice["logprobs"]["token_logprobs"]
    assert told[0] is None
    assert told[1:] == pytest.approx(expected, abs=1e-4)
    assert sum(told[1:]) == pytest.approx(sum(expected), abs=1e-3)
    assert choice["text"] == server.tokenizer.decode(prompt)
    assert choice["finish_reason"] == "length"


def test_seeds_repeat_and_their_absence_does_not(http):
    seeded = [texts(complete(http, seed=5, n=3)) for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert len(set(seeded[0])) == 3
    assert texts(complete(http, seed=6)) != texts(complete(http, seed=5))
    assert texts(complete(http)) != texts(complete(http))
    same = texts(complete(http, seed=5, prompt=["The tern", "The tern"]))
    assert same == seeded[0][:2]


def test_stop_strings_across_tokens_end_a_text_wherever_they_begin(http):
    (text,) = texts(complete(http, temperature=0))
    for size in (1, 2, 4):
        for first in range(size, len(text) - 4, 12):
            stop = text[first : first + size]
            choice = complete(http, temperature=0, stop=[stop, "never"]).json()["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_after_a_stop_string_the_engine_goes_on_with_nothing(server, http):
    (text,) = texts(complete(http, temperature=0))
    before = server.backend.load().output_tokens
    complete(http, temperature=0, stop=text[1:3], max_tokens=400)
    wait_until(server.is_free)
    assert server.backend.load().output_tokens - before < 100


def test_cached_tokens_are_told(http):
    prompt = list(range(40, 90))
    first = complete(http, prompt=prompt, max_tokens=1).json()["usage"]
    second = complete(http, prompt=prompt, max_tokens=1, n=2).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == 48
    assert (second["prompt_tokens"], second["completion_tokens"]) == (50, 2)


def test_a_text_goes_on_to_the_end_of_the_context_where_nothing_is_said(server, http):
    answer = http.post(
        CHAT, json={"model": "tiny", "messages": ASK, "logit_bias": {"300": 100}, "temperature": 0}
    ).json()
    assert answer["usage"]["total_tokens"] == server.engine.longest
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_model_without_a_protocol_completes_and_says_why_it_does_not_chat():
    with serving(no_chat=True) as server, server.http() as http:
        refused = http.post(CHAT, json={"model": "tiny", "messages": ASK})
        assert refused.status_code == 400
        assert "doesn't tell how it was trained to chat" in refused.json()["error"]["message"]
        assert http.post("/tokenize", json={"messages": ASK}).status_code == 400
        assert texts(complete(http, max_tokens=2))


def test_an_internlm2_calls_tools_by_its_own_tokens():
    pytest.importorskip("llguidance")
    parameters = {"type": "object", "properties": {"city": {"enum": ["燕", "Paris"]}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    with serving("internlm2", tokenizer_for("internlm2")) as server, server.http() as http:
        settings = {
            "tools": tools,
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "seed": 1,
            "max_tokens": 150,
        }
        bias = {"logit_bias": {str(server.tokenizer.encode("}")[0]): 50}}
        (answer,) = chat(http, **settings, **bias).json()["choices"]
        assert answer["finish_reason"] == "tool_calls"
        (call,) = answer["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["city"] in ("燕", "Paris")
        chunks = events_of(chat(http, stream=True, **settings, **bias).text)
        pieces = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", [])]
        assert "".join(piece["function"]["arguments"] for piece in pieces) == call["function"]["arguments"]
        said = [*ASK, answer["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
        tokens = http.post("/tokenize", json={"messages": said, "tools": tools}).json()["tokens"]
        assert server.tokenizer.id_of("<|action_start|>") in tokens
        assert INTERNLM2.stop[0] not in http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]


def test_without_the_library_grammars_are_refused_and_the_rest_is_served(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with serving() as server, server.http() as http:
        form = {"response_format": {"type": "json_object"}}
        answer = http.post(CHAT, json={"model": "tiny", "messages": ASK, "max_tokens": 4, **form})
        assert answer.status_code == 400
        assert "pip install llguidance" in answer.json()["error"]["message"]
        chat(http)


LEAF = {"enum": [1]}
TREE = {
    "type": "object",
    "properties": {
        "v": LEAF,
        "w": {"$ref": "#/properties/v"},
        "x": {"$ref": "#/$defs/x"},
        "more": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1},
    },
    "required": ["v", "w", "x", "more"],
    "additionalProperties": False,
    "$defs": {"x": {"enum": ["one"]}},
}
OTHER = {"type": "object", "properties": {"x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"enum": ["two"]}}}


@pytest.mark.skipif(find_spec("llguidance") is None, reason="pip install llguidance")
@pytest.mark.parametrize("num_tools", [1, 2])
def test_what_a_tools_schema_refers_to_is_its_own(http, num_tools):
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in [("tree", TREE), ("other", OTHER)]
    ][:num_tools]
    body = {"model": "tiny", "messages": ASK, "tools": tools, "max_tokens": 240, "seed": 1}
    answer = http.post(CHAT, json={**body, "tool_choice": {"type": "function", "function": {"name": "tree"}}})
    assert answer.status_code == 200, answer.text
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    found = [json.loads(call["function"]["arguments"])]
    while found:
        given = found.pop()
        assert {key: value for key, value in given.items() if key != "more"} == {"v": 1, "w": 1, "x": "one"}
        found += given["more"]


@pytest.mark.skipif(find_spec("llguidance") is None, reason="pip install llguidance")
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_as_it_must_is_an_error_not_an_end(http, server, stream, caplog):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    body = {"model": "tiny", "messages": ASK, "response_format": form, "stream": stream}
    answer = http.post(CHAT, json=body)
    told = events_of(answer.text)[0] if stream else answer.json()
    assert answer.status_code == (200 if stream else 500)
    assert told["error"]["code"] == "internal_error"
    assert "a text was ended: a grammar was given up" in caplog.text
    assert server.is_free()
