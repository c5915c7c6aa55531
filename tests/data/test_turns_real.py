"""Real files to samples: InternLM's own way, the short cuts against the long way, and all of them whole."""

import json

import pytest
from chats import SHARED, encode, tokenizer_for

from ternlm.data.chat import encode_chat
from ternlm.data.conversations import Conversation, detect_format, read_conversation
from ternlm.data.protocols import INTERNLM, PROTOCOLS


@pytest.mark.parametrize("file", ["alpaca_en_demo", "alpaca_zh_demo"])
def test_alpaca_is_what_internlms_own_tool_made(file: str) -> None:
    """But for the newline after <eoh> and <eoa>: 364, as inference sends it, where the tool had the byte, 13."""
    tokenizer = tokenizer_for("internlm")
    plain, eoh, eoa, newline = tokenizer.encode, 103027, 103028, 364
    assert plain("\n") == [newline]
    for record in json.loads((SHARED / "alpaca" / f"{file}.json").read_text("utf-8"))[:200]:
        asked = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
        before = [1, *plain("<|User|>:" + asked), eoh, newline, *plain("<|Bot|>:")]
        after = [*plain(record["output"]), eoa, newline, 2]
        (sample,) = encode(tokenizer, INTERNLM, read_conversation(record, "alpaca"))
        assert sample.ids == before + after
        assert sample.trained.tolist() == [False] * len(before) + [True] * len(after)


# Records, each a sample, and the tokens trained of them with InternLM2's tokenizer.
FILES = {
    "alpaca/alpaca_en_demo.json": (999, 148_120),
    "alpaca/alpaca_zh_demo.json": (1_000, 108_259),
    "toolcall/glaive_toolcall_en_demo.json": (300, 88_176),
    "toolcall/glaive_toolcall_zh_demo.json": (300, 74_010),
    "gsm8k/train.jsonl": (7_473, 767_080),
}


def conversations(file: str, step: int = 1) -> list[Conversation]:
    if not (SHARED / file).is_file():
        pytest.skip(f"{file} isn't there")
    text = (SHARED / file).read_text("utf-8")
    records = [json.loads(line) for line in text.splitlines()] if file.endswith("l") else json.loads(text)
    assert len(records) == FILES[file][0]
    return [read_conversation(record, detect_format(record) or "text") for record in records[::step]]


@pytest.mark.parametrize("name", ["internlm", "internlm2", "chatml"])
@pytest.mark.parametrize("file", FILES)
def test_beginnings_told_from_the_whole_are_those_that_inference_encodes(file: str, name: str) -> None:
    """The short cut against the long way, over real files: every turn's prompt encoded on its own."""
    if name == "internlm" and "tool" in file:
        pytest.skip("InternLM has no tools")
    tokenizer, protocol = tokenizer_for(name), PROTOCOLS[name]
    for conversation in conversations(file, 23):
        messages, tools = conversation.messages, conversation.tools
        answers = [number for number, message in enumerate(messages) if message["loss"]]
        samples = encode(tokenizer, protocol, conversation)
        whole = encode_chat(tokenizer, protocol.template, messages[: answers[-1] + 1], False, tools)
        prompts = [encode_chat(tokenizer, protocol.template, messages[:number], True, tools) for number in answers]
        one = all(whole[: len(prompt)] == prompt for prompt in prompts)
        assert len(samples) == (1 if one else len(answers))
        for number, prompt in enumerate(prompts):
            sample = samples[0 if one else number]
            assert sample.ids[: len(prompt)] == prompt
            assert (sample.trained[len(prompt) - 1 : len(prompt) + 1]).tolist() == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internlm2", "chatml"])
@pytest.mark.parametrize("file", FILES)
def test_real_files_encode_whole(file: str, name: str) -> None:
    tokenizer = tokenizer_for(name)
    samples = [sample for each in conversations(file) for sample in encode(tokenizer, PROTOCOLS[name], each)]
    assert len(samples) == FILES[file][0]
    assert all(sample.ids[int(sample.trained.nonzero()[0][-1])] == tokenizer.id_of("<|im_end|>") for sample in samples)
    if name == "internlm2":
        assert sum(int(sample.trained.sum()) for sample in samples) == FILES[file][1]
