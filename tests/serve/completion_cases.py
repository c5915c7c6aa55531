"""More cases for `conformance`, of any server: completions, and what is refused."""

import json

import openai
import pytest
from conformance import ASK, PROMPT, complete, raw, refused

# Completions


def case_a_completion_has_its_shape(client, model):
    answer = complete(client, model)
    assert (answer.object, answer.model) == ("text_completion", model)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def case_sixteen_tokens_by_default(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT)
    assert answer.usage.completion_tokens <= 16


def case_a_completion_streams_as_it_is(client, model):
    chunks = list(complete(client, model, temperature=0, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    answer = complete(client, model, temperature=0)
    assert text == answer.choices[0].text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def case_echo_gives_the_prompt_back(client, model):
    text = complete(client, model, temperature=0).choices[0].text
    assert complete(client, model, temperature=0, echo=True).choices[0].text == PROMPT + text


def case_echo_streams_the_prompt_first(client, model):
    chunks = list(complete(client, model, temperature=0, echo=True, stream=True))
    whole = complete(client, model, temperature=0, echo=True).choices[0].text
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole


def case_completion_logprobs_have_their_shape(client, model):
    answer = complete(client, model, logprobs=3, max_tokens=6, temperature=0)
    told = answer.choices[0].logprobs
    num = answer.usage.completion_tokens
    assert [len(told.tokens), len(told.token_logprobs), len(told.top_logprobs), len(told.text_offset)] == [num] * 4
    assert all(value <= 0 for value in told.token_logprobs)
    assert all(1 <= len(tops) <= 4 for tops in told.top_logprobs)


def case_echoed_logprobs_begin_with_none(client, model):
    answer = complete(client, model, logprobs=1, echo=True, max_tokens=3, temperature=0)
    told = answer.choices[0].logprobs
    assert told.token_logprobs[0] is None
    assert all(value <= 0 for value in told.token_logprobs[1:])
    assert len(told.tokens) == answer.usage.total_tokens


def case_offsets_are_of_the_text(client, model):
    choice = complete(client, model, logprobs=0, echo=True, max_tokens=1, temperature=0).choices[0]
    text, told = choice.text, choice.logprobs
    assert told.text_offset == sorted(told.text_offset)
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert token.startswith(("<", "bytes:")) or text.startswith(token, offset)


def case_prompts_are_answered_in_their_order(client, model):
    prompts = ["The sea is", "Birds are", "One, two,"]
    answer = complete(client, model, prompt=prompts, temperature=0, max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = [complete(client, model, prompt=each, temperature=0, max_tokens=8).choices[0].text for each in prompts]
    assert [choice.text for choice in answer.choices] == alone


def case_n_texts_of_each_prompt(client, model):
    answer = complete(client, model, prompt=["The sea is", "Birds are"], n=2, max_tokens=2)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2, 3]


def case_token_ids_are_a_prompt(client, model):
    answer = complete(client, model, prompt=[100, 200, 300, 400], temperature=0, max_tokens=4)
    assert answer.usage.prompt_tokens == 4
    both = complete(client, model, prompt=[[100, 200, 300, 400], [5, 6, 7]], temperature=0, max_tokens=4)
    assert both.choices[0].text == answer.choices[0].text
    assert both.usage.prompt_tokens == 7


def case_a_completion_stops_at_a_string(client, model):
    text = complete(client, model, temperature=0).choices[0].text
    stop = text[4:6]
    choice = complete(client, model, temperature=0, stop=[stop]).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def case_a_completion_repeats_by_a_seed(client, model):
    first, second = (complete(client, model, seed=11).choices[0].text for _ in range(2))
    assert first == second


# What is refused


def case_values_outside_their_rules_are_refused(client, model):
    wrong = [
        {"temperature": -0.1}, {"top_p": 1.5}, {"top_p": -1}, {"max_tokens": -5}, {"n": 0}, {"presence_penalty": 9},
        {"top_logprobs": 99, "logprobs": True}, {"messages": []}, {"temperature": "hot"}, {"stop": 7},
    ]  # fmt: skip
    for each in wrong:
        refused(client, model, **each)


def case_an_unknown_role_is_refused(client, model):
    refused(client, model, messages=[{"role": 7, "content": "hi"}])


def case_more_tokens_than_fit_are_refused(client, model):
    refused(client, model, max_tokens=10_000_000)
    with pytest.raises(openai.BadRequestError):
        complete(client, model, prompt="sea " * 50_000)


def case_what_is_no_json_is_refused(client, model):
    answer = raw(client, "POST", "/v1/chat/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500


def case_an_error_tells_what_is_wrong(client, model):
    answer = raw(client, "POST", "/v1/chat/completions", json={"model": model, "messages": ASK, "temperature": -1})
    assert answer.status_code == 400
    assert "temperature" in json.dumps(answer.json())
    assert answer.json()["error"]["message"]


def case_unknown_paths_and_methods(client, model):
    assert raw(client, "GET", "/v1/nowhere").status_code == 404
    assert raw(client, "GET", "/v1/chat/completions").status_code == 405
