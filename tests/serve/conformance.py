"""What any server of OpenAI's interface must do, by the official client; the same file for TernLM and for others.

Functions that begin with `case_` take a client and a model's name. What TernLM alone has is in `own_cases`. Nothing
here depends on what the model has learnt.
"""

import asyncio
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

ASK = [{"role": "user", "content": "Say something about the sea."}]
PROMPT = "The sea is"
LONG = 24


def chat(client: OpenAI, model: str, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": model, "messages": ASK, "max_tokens": LONG, **more})


def complete(client: OpenAI, model: str, **more: Any) -> Any:
    return client.completions.create(**{"model": model, "prompt": PROMPT, "max_tokens": LONG, **more})


def said(client: OpenAI, model: str, **more: Any) -> str:
    return chat(client, model, **more).choices[0].message.content


def streamed(client: OpenAI, model: str, **more: Any) -> list[Any]:
    return list(chat(client, model, stream=True, **more))


def joined(chunks: list[Any], index: int = 0) -> str:
    own = (choice for chunk in chunks for choice in chunk.choices if choice.index == index)
    return "".join(choice.delta.content or "" for choice in own)


def refused(client: OpenAI, model: str, **more: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, **more)
    assert caught.value.body is not None


def raw(client: OpenAI, method: str, path: str, **more: Any) -> httpx.Response:
    url = str(client.base_url).rstrip("/").removesuffix("/v1") + path
    headers = {"Authorization": f"Bearer {client.api_key}", **more.pop("headers", {})}
    return httpx.request(method, url, headers=headers, timeout=60, **more)


# Models


def case_models_are_listed(client, model):
    found = {each.id: each for each in client.models.list().data}
    assert found[model].object == "model"


def case_an_unknown_model_is_not_found(client, model):
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody/has-this")
    with pytest.raises(openai.NotFoundError):
        chat(client, "nobody/has-this")
    with pytest.raises(openai.NotFoundError):
        complete(client, "nobody/has-this")


# Chat


def case_an_answer_has_its_shape(client, model):
    answer = chat(client, model)
    (choice,) = answer.choices
    assert (answer.object, answer.model, choice.index) == ("chat.completion", model, 0)
    assert answer.id
    assert answer.created > 1_600_000_000
    assert choice.message.role == "assistant"
    assert isinstance(choice.message.content, str)
    assert choice.finish_reason in ("stop", "length")


def case_usage_adds_up(client, model):
    usage = chat(client, model).usage
    assert usage.prompt_tokens > 0
    assert 0 < usage.completion_tokens <= LONG
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def case_one_token_ends_by_length(client, model):
    answer = chat(client, model, max_tokens=1, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 1


def case_max_completion_tokens_is_max_tokens(client, model):
    messages = {"model": model, "messages": ASK, "temperature": 0}
    first = client.chat.completions.create(**messages, max_completion_tokens=3)
    second = client.chat.completions.create(**messages, max_tokens=3)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.completion_tokens == second.usage.completion_tokens == 3


def case_a_system_message_counts(client, model):
    system = [{"role": "system", "content": "You are a bird and talk like one."}, *ASK]
    assert chat(client, model, messages=system).usage.prompt_tokens != chat(client, model).usage.prompt_tokens


def case_a_longer_conversation_has_more_tokens(client, model):
    longer = [*ASK, {"role": "assistant", "content": "It is blue."}, {"role": "user", "content": "And more?"}]
    assert chat(client, model, messages=longer).usage.prompt_tokens > chat(client, model).usage.prompt_tokens


def case_parts_of_text_are_a_text(client, model):
    parts = [{"type": "text", "text": "Say something "}, {"type": "text", "text": "about the sea."}]
    answer = chat(client, model, messages=[{"role": "user", "content": parts}], temperature=0)
    assert answer.choices[0].message.content


def case_one_part_is_the_text_itself(client, model):
    parts = [{"type": "text", "text": ASK[0]["content"]}]
    answer = chat(client, model, messages=[{"role": "user", "content": parts}])
    assert answer.usage.prompt_tokens == chat(client, model).usage.prompt_tokens


def case_any_script_can_be_sent(client, model):
    text = '燕鸥飞得很远 🐦‍⬛ é ⵣ\n\t"quoted" \\ back'
    assert chat(client, model, messages=[{"role": "user", "content": text}]).choices[0].message.content is not None


def case_an_empty_message_can_be_sent(client, model):
    assert chat(client, model, messages=[{"role": "user", "content": ""}]).usage.prompt_tokens > 0


# Sampling


def case_greedy_answers_repeat(client, model):
    assert said(client, model, temperature=0) == said(client, model, temperature=0)


def case_a_seed_repeats(client, model):
    assert said(client, model, seed=5) == said(client, model, seed=5)


def case_seeds_differ(client, model):
    assert len({said(client, model, seed=seed, temperature=1.5) for seed in range(4)}) > 1


def case_without_a_seed_answers_differ(client, model):
    assert len({said(client, model, temperature=1.5) for _ in range(4)}) > 1


def case_n_gives_n_choices(client, model):
    answer = chat(client, model, n=3)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    assert answer.usage.completion_tokens > 3


def case_choices_differ_among_themselves(client, model):
    answer = chat(client, model, n=4, temperature=1.5, seed=1)
    assert len({choice.message.content for choice in answer.choices}) > 1


def case_greedy_answers_are_the_same(client, model):
    assert said(client, model, temperature=0) == said(client, model, temperature=0)


def case_choices_repeat_by_a_seed(client, model):
    first, second = (chat(client, model, n=3, seed=9) for _ in range(2))
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, second)]
    assert texts[0] == texts[1]


def case_a_tiny_top_p_is_greedy(client, model):
    assert said(client, model, top_p=1e-6) == said(client, model, temperature=0)


def case_a_bias_forces_a_token(client, model):
    answer = chat(client, model, logit_bias={"300": 100}, temperature=0, logprobs=True, max_tokens=4)
    assert len({entry.token for entry in answer.choices[0].logprobs.content}) == 1


def case_a_bias_bans_a_token(client, model):
    forced = said(client, model, logit_bias={"300": 100}, temperature=0, max_tokens=2)
    assert said(client, model, logit_bias={"300": -100}, temperature=0, max_tokens=2) != forced


def case_penalties_are_taken(client, model):
    for value in (-2, 0.5, 2):
        assert isinstance(said(client, model, frequency_penalty=value, presence_penalty=value, max_tokens=5), str)


# Stop strings


def whole(client: OpenAI, model: str) -> str:
    text = said(client, model, temperature=0)
    assert len(text) > 8
    return text


def case_a_stop_string_ends_the_text(client, model):
    text = whole(client, model)
    stop = text[5:8]
    answer = chat(client, model, temperature=0, stop=stop)
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def case_the_first_of_several_stop_strings_counts(client, model):
    text = whole(client, model)
    stops = [text[6:8], text[3:5], "never said"]
    expected = text[: min(text.index(stop) for stop in stops[:2])]
    assert said(client, model, temperature=0, stop=stops) == expected


def case_a_stop_string_within_a_token_or_across_tokens(client, model):
    text = whole(client, model)
    for size in (1, 2, 5):
        stop = text[4 : 4 + size]
        assert said(client, model, temperature=0, stop=stop) == text[: text.index(stop)]


def case_a_stop_string_that_never_comes_changes_nothing(client, model):
    text = whole(client, model)
    assert said(client, model, temperature=0, stop=["never said", text[-1] + "never"]) == text


def case_a_stream_never_tells_a_stop_string(client, model):
    text = whole(client, model)
    stop = text[5:9]
    chunks = streamed(client, model, temperature=0, stop=stop)
    assert joined(chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


# Streams


def case_a_stream_is_the_answer(client, model):
    assert joined(streamed(client, model, temperature=0)) == said(client, model, temperature=0)


def case_a_stream_with_a_seed_is_the_answer(client, model):
    assert joined(streamed(client, model, seed=3)) == said(client, model, seed=3)


def case_chunks_have_their_shape(client, model):
    chunks = streamed(client, model)
    assert {(chunk.object, chunk.model) for chunk in chunks} == {("chat.completion.chunk", model)}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"


def case_the_last_chunk_has_the_reason(client, model):
    reasons = [choice.finish_reason for chunk in streamed(client, model) for choice in chunk.choices]
    assert reasons[-1] in ("stop", "length")
    assert set(reasons[:-1]) <= {None}


def case_a_stream_tells_usage_if_asked(client, model):
    chunks = streamed(client, model, temperature=0, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    whole = chat(client, model, temperature=0).usage
    assert chunks[-1].usage.completion_tokens == whole.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.prompt_tokens


def case_a_stream_tells_no_usage_unasked(client, model):
    assert all(getattr(chunk, "usage", None) is None for chunk in streamed(client, model))


def case_choices_stream_side_by_side(client, model):
    chunks = streamed(client, model, n=2, seed=4)
    answer = chat(client, model, n=2, seed=4)
    for choice in answer.choices:
        assert joined(chunks, choice.index) == choice.message.content


def case_a_stream_can_be_left(client, model):
    stream = chat(client, model, stream=True, max_tokens=64)
    next(iter(stream))
    stream.close()
    assert said(client, model, max_tokens=2) is not None


def case_many_at_once_are_each_what_they_are_alone(client, model):
    prompts = [f"Number {number}, and then" for number in range(8)]
    alone = [complete(client, model, prompt=prompt, temperature=0, max_tokens=8).choices[0].text for prompt in prompts]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as other:
            asked = (
                other.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=8) for prompt in prompts
            )
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == alone


# Log-probabilities of chats


def case_no_logprobs_unasked(client, model):
    assert chat(client, model).choices[0].logprobs is None


def case_logprobs_of_each_token(client, model):
    answer = chat(client, model, logprobs=True, temperature=0, max_tokens=6)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    assert all(entry.logprob <= 0 for entry in entries)
    assert all(entry.top_logprobs == [] for entry in entries)


def case_top_logprobs_are_as_many_as_asked(client, model):
    entries = (
        chat(client, model, temperature=0, logprobs=True, top_logprobs=4, max_tokens=5).choices[0].logprobs.content
    )
    for entry in entries:
        values = [each.logprob for each in entry.top_logprobs]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)


def case_greedy_takes_the_top(client, model):
    answer = chat(client, model, logprobs=True, top_logprobs=2, temperature=0, max_tokens=5)
    for entry in answer.choices[0].logprobs.content:
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-3)


def case_bytes_of_tokens_are_the_text(client, model):
    choice = chat(client, model, logprobs=True, temperature=0, max_tokens=12).choices[0]
    found = b"".join(bytes(entry.bytes or b"") for entry in choice.logprobs.content)
    assert found.decode("utf-8", "replace").startswith(choice.message.content.rstrip("\ufffd"))


def case_logprobs_stream_as_they_are(client, model):
    chunks = streamed(client, model, logprobs=True, top_logprobs=1, temperature=0)
    entries = chat(client, model, logprobs=True, top_logprobs=1, temperature=0).choices[0].logprobs.content
    told = [each for chunk in chunks for choice in chunk.choices for each in (choice.logprobs or _NONE).content or ()]
    assert [each.token for each in told] == [each.token for each in entries]


class _NONE:
    content = None
