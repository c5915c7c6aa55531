"""What of a conversation is trained, token by token: just what a model has to say after what inference sends it."""

import json

import numpy as np
import pytest
from chats import LLAMA_TOKENS, TEXT, encode, talk, tokenizer_for

from ternlm.data.chat import encode_chat, render
from ternlm.data.conversations import Conversation, NoAnswer
from ternlm.data.errors import DataError
from ternlm.data.protocols import CHATML, INTERNLM, INTERNLM2, LLAMA3, PROTOCOLS, ChatProtocol
from ternlm.data.tokenizer import Tokenizer, train_bpe
from ternlm.data.turns import Sample, encode_turns, template_is_prefix

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def spelt(tokenizer: Tokenizer, samples: list[Sample]) -> list[list[tuple[str, bool]]]:
    return [
        [
            (tokenizer.decode([index], skip_special=False), trained)
            for index, trained in zip(sample.ids, mask, strict=True)
        ]
        for sample, mask in ((sample, sample.trained.tolist()) for sample in samples)
    ]


def given(*tokens: str) -> list[tuple[str, bool]]:
    return [(token, False) for token in tokens]


def learnt(*tokens: str) -> list[tuple[str, bool]]:
    return [(token, True) for token in tokens]


TWO = talk(("system", "be kind"), ("user", "hello"), ("assistant", "hi"), ("user", "and?"), ("assistant", "no"))


def test_internlms_mask_by_hand() -> None:
    tokenizer = tokenizer_for("internlm")
    bot, user = ("<", "|", "Bot", "|", ">:"), ("<", "|", "User", "|", ">:")
    assert spelt(tokenizer, encode(tokenizer, INTERNLM, TWO)) == [
        given("<s>", "<", "|", "System", "|", ">:", "be", " kind", "<eoh>", "\n")
        + given(*user, "hello", "<eoh>", "\n", *bot)
        + learnt("hi", "<eoa>", "\n")
        + given(*user, "and", "?", "<eoh>", "\n", *bot)
        + learnt("no", "<eoa>", "\n", "</s>")
    ]


def test_internlms_turns_are_a_sample_each_where_a_past_turn_begins_with_another_token_than_the_newest():
    tokenizer = tokenizer_for("internlm")
    three = [(role, text) for number in "135" for role, text in [("user", number), ("assistant", str(int(number) + 1))]]
    bot, user = ("<", "|", "Bot", "|", ">:"), ("<", "|", "User", "|", ">:")
    said = learnt("</s>")
    assert spelt(tokenizer, encode(tokenizer, INTERNLM, talk(*three))) == [
        given("<s>", *user, "1", "<eoh>", "\n", *bot) + learnt("2", "<eoa>", "\n") + said,
        given("<s>", *user, "1", "<eoh>", "\n", *bot, "2", "<eoa>", "\n", *user, "3", "<eoh>", "\n", *bot)
        + learnt("4", "<eoa>", "\n")
        + said,
        given("<s>", *user, "1", "<eoh>", "\n", *bot, "2", "<eoa>", "\n")
        + given("<s>", *user, "3", "<eoh>", "\n", *bot, "4", "<eoa>", "\n", *user, "5", "<eoh>", "\n", *bot)
        + learnt("6", "<eoa>", "\n")
        + said,
    ]
    assert not template_is_prefix(tokenizer, INTERNLM.template, talk(*three))
    assert template_is_prefix(tokenizer, INTERNLM.template, talk(*three[:4]))


def test_internlm2s_mask_by_hand() -> None:
    tokenizer = tokenizer_for("internlm2")
    end, answer = ("<|im_end|>", "\n"), ("<|im_start|>", "ass", "istant", "\n")
    assert spelt(tokenizer, encode(tokenizer, INTERNLM2, TWO)) == [
        given("<s>", "<|im_start|>", "system", "\n", "be", " kind", *end)
        + given("<|im_start|>", "user", "\n", "hello", *end, *answer)
        + learnt("hi", "<|im_end|>")
        + given("\n", "<|im_start|>", "user", "\n", "and", "?", *end, *answer)
        + learnt("no", "<|im_end|>")
        + given("\n")
    ]


def tool_talk() -> Conversation:
    asked, said = talk(("user", "hello")).messages, talk(("tool", "7"), ("assistant", "hi")).messages
    return Conversation(
        [*asked, {"role": "assistant", "content": "", "tool_calls": [CALL], "loss": True}, *said], [TOOL]
    )


def test_internlm2s_calls_of_tools_are_trained_and_results_are_not() -> None:
    tokenizer = tokenizer_for("internlm2")
    end, answer = ("<|im_end|>", "\n"), ("<|im_start|>", "ass", "istant", "\n")
    plugin = ("<|im_start|>", "system", " name", "=", "<|plugin|>", "\n", "[", '{"', "name", '":', ' "', "f", '"}', "]")
    assert spelt(tokenizer, encode(tokenizer, INTERNLM2, tool_talk())) == [
        given("<s>", *plugin, *end, "<|im_start|>", "user", "\n", "hello", *end, *answer)
        + learnt("<|action_start|>", "<|plugin|>", "\n", '{"', "name", '":', ' "', "f", '",', ' "', "parameters")
        + learnt('":', ' {"', "x", '":', " ", "1", "}}", "<|action_end|>", "<|im_end|>")
        + given("\n", "<|im_start|>", "environment", " name", "=", "<|plugin|>", "\n", "7", *end, *answer)
        + learnt("hi", "<|im_end|>")
        + given("\n")
    ]


def test_chatmls_mask_by_hand() -> None:
    tokenizer = tokenizer_for("chatml")
    end, answer = ("<|im_end|>", "\n"), ("<|im_start|>", "ass", "istant", "\n")
    assert spelt(tokenizer, encode(tokenizer, CHATML, TWO)) == [
        given("<|im_start|>", "system", "\n", "be", " kind", *end)
        + given("<|im_start|>", "user", "\n", "hello", *end, *answer)
        + learnt("hi", "<|im_end|>")
        + given("\n", "<|im_start|>", "user", "\n", "and", "?", *end, *answer)
        + learnt("no", "<|im_end|>")
        + given("\n")
    ]
    (sample,) = spelt(tokenizer, encode(tokenizer, CHATML, tool_talk()))
    calls = learnt("<", "tool", "_", "call", ">", "\n", '{"', "name", '":', ' "', "f", '",', ' "', "arguments", '":')
    calls += learnt(' {"', "x", '":', " ", "1", "}}", "\n", "</", "tool", "_", "call", ">", "<|im_end|>")
    result = given("\n", "<|im_start|>", "user", "\n", "<", "tool", "_", "response", ">", "\n", "7", "\n", "</")
    result += given("tool", "_", "response", ">", *end, *answer)
    rest = given(*answer) + calls + result + learnt("hi", "<|im_end|>") + given("\n")
    assert sample[-len(rest) :] == rest
    assert not any(trained for _, trained in sample[: -len(rest)])


def test_llama3s_mask_by_hand() -> None:
    tokenizer = tokenizer_for("llama3")

    def head(*role: str) -> list[tuple[str, bool]]:
        return given("<|start_header_id|>", *role, "<|end_header_id|>", "\n\n")

    assert spelt(
        tokenizer, encode(tokenizer, LLAMA3, talk(*[(m["role"], m["content"]) for m in TWO.messages[1:]]))
    ) == [
        given("<|begin_of_text|>")
        + head("user")
        + given("hello", "<|eot_id|>")
        + head("as", "sistant")
        + learnt("h", "i", "<|eot_id|>")
        + head("user")
        + given("an", "d", "?", "<|eot_id|>")
        + head("as", "sistant")
        + learnt("no", "<|eot_id|>")
    ]


MANY = [
    talk(("user", "hello"), ("assistant", "hi")),
    TWO,
    talk(("system", ""), ("user", ""), ("assistant", "你好 🙂 e\u0301")),
    talk(("assistant", "\nhi"), ("user", "\n"), ("assistant", ":no\n\n"), ("user", "x"), ("assistant", " yes ")),
    talk(
        ("user", "a"), ("user", "b"), ("assistant", '"hi"'), ("assistant", "\n\nno"), ("user", "c"), ("assistant", "d")
    ),
    talk(
        ("user", "<|im_end|><eoa></s><|eot_id|>"), ("assistant", "<|im_start|>user\n<|eot_id|><eoh>"), ("user", "<s>")
    ),
]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_answer_follows_what_inference_sends_id_for_id(name: str) -> None:
    """For each protocol and turn: the ids before what is trained are `encode_chat`'s, what is trained is the rest."""
    tokenizer, protocol = tokenizer_for(name), PROTOCOLS[name]
    stop = {tokenizer.id_of(token) for token in protocol.stop}
    for conversation in [*MANY, *([] if name == "internlm" else [tool_talk()])]:
        tools, messages = conversation.tools, conversation.messages
        answers = [number for number, message in enumerate(messages) if message["loss"]]
        samples = encode(tokenizer, protocol, conversation)
        for order, number in enumerate(answers):
            sample = samples[order] if len(samples) > 1 else samples[0]
            prompt = encode_chat(tokenizer, protocol.template, messages[:number], True, tools)
            assert sample.ids[: len(prompt)] == prompt
            assert not sample.trained[len(prompt) - 1]
            said = []
            for index, trained in zip(sample.ids[len(prompt) :], sample.trained[len(prompt) :], strict=True):
                if not trained:
                    break
                said.append(index)
            wanted = render(protocol.template, messages[: number + 1], False, tokenizer, tools)
            wanted = wanted[len(render(protocol.template, messages[:number], True, tokenizer, tools)) :]
            eos = "</s>" if protocol.document_end and said[-1] == tokenizer.eos_id else ""
            assert tokenizer.decode(prompt + said, skip_special=False) == (
                tokenizer.decode(prompt, skip_special=False)
                + (wanted if protocol.after_end else wanted.rstrip("\n"))
                + eos
            )
            ends = [index for index in said if index in stop]
            assert len(ends) == (2 if eos else 1)


@pytest.mark.parametrize("name", ["chatml", "internlm2", "llama3"])
def test_what_a_token_straddles_is_encoded_apart(name: str) -> None:
    """The answer begins with what the tokenizer would join with the prompt's end."""
    protocol = PROTOCOLS[name]
    tokens = (*LLAMA_TOKENS, "<s>", "</s>", *INTERNLM2.names.values())
    tokenizer = train_bpe(iter([TEXT + "\n\n\n\n\n\n\nassistant\n\n\nassistant\n\nno:no"] * 30), 327, tokens)
    template = protocol.template.replace("| trim", "")  # Llama's trims answers, so nothing of them can straddle
    protocol = ChatProtocol(template, protocol.stop)
    straddling = talk(("user", "hello"), ("assistant", "\n\nyes"), ("user", "x"), ("assistant", "no"))
    whole = encode_chat(tokenizer, template, straddling.messages, False)
    first, second = encode(tokenizer, protocol, straddling)
    prompt = encode_chat(tokenizer, template, straddling.messages[:1])
    assert whole[: len(prompt)] != prompt
    assert first.ids[: len(prompt)] == prompt
    answer = tokenizer.encode_markup("\n\nyes")
    assert first.ids[len(prompt) : len(prompt) + len(answer)] == answer
    assert tokenizer.decode(first.ids) == tokenizer.decode(
        encode_chat(tokenizer, template, straddling.messages[:2], False)
    )
    assert second.ids == whole
    assert int(second.trained.sum()) == 2
    typed = talk(("user", "hello"), ("assistant", f"\n\n{protocol.stop[0]}yes"))
    (sample,) = encode(tokenizer, protocol, typed)
    end = tokenizer.id_of(protocol.stop[0])
    assert [index for index, trained in zip(sample.ids, sample.trained, strict=True) if trained].count(end) == 1
    assert tokenizer.decode(sample.ids, skip_special=False) == render(template, typed.messages, False, tokenizer)


def test_a_tokenizer_that_changes_an_answer_apart_is_refused() -> None:
    plain = train_bpe(iter([TEXT + "\n\n\n\nuser\n\n\n"] * 30), 300, ("<|im_start|>", "<|im_end|>"))
    content = json.loads(plain._text)
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    tokenizer = Tokenizer(json.dumps(content))
    with pytest.raises(
        DataError, match=r"can't encode the answer of message 1 apart from what is before it without chan"
    ):
        encode(tokenizer, CHATML, talk(("user", "hello"), ("assistant", "\n\nyes")))


THINKS = (
    "{%- set last = namespace(asked=0) -%}"
    "{%- for m in messages if m.role == 'user' -%}{%- set last.asked = messages.index(m) -%}{%- endfor -%}"
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > last.asked -%}{{ '<think>' + m.reasoning_content + '</think>' }}"
    "{%- endif -%}{{ m.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_bpe(iter([TEXT] * 30), 314, ("<s>", "</s>", "<|im_start|>", "<|im_end|>"))


def test_a_template_that_drops_old_thoughts_is_trained_turn_by_turn_with_them(small: Tokenizer) -> None:
    conversation = talk(("user", "hello"), ("assistant", "hi"), ("user", "and"), ("assistant", "no"))
    for message in conversation.messages[1::2]:
        message["reasoning_content"] = "hm" + message["content"]
    protocol = ChatProtocol(THINKS, ("<|im_end|>",))
    samples = encode(small, protocol, conversation)
    said = [small.decode(np.array(sample.ids)[sample.trained], skip_special=False) for sample in samples]
    assert said == ["<think>hmhi</think>hi<|im_end|>", "<think>hmno</think>no<|im_end|>"]
    assert "hmhi" not in small.decode(samples[1].ids)


def test_only_answers_with_loss_are_trained_and_what_follows_the_last_is_left_out(small: Tokenizer) -> None:
    conversation = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))
    conversation.messages[1]["loss"] = False
    (sample,) = encode(small, CHATML, conversation)
    assert sample.ids == encode_chat(small, CHATML.template, conversation.messages[:4], False)
    assert small.decode(np.array(sample.ids)[sample.trained], skip_special=False) == "d<|im_end|>"
    conversation.messages[3]["loss"] = False
    with pytest.raises(NoAnswer, match="no answer to train on"):
        encode(small, CHATML, conversation)


def test_a_conversation_without_a_system_message_gets_the_one_given(small: Tokenizer) -> None:
    asked = ("user", "hello"), ("assistant", "hi")
    (sample,) = encode(small, CHATML, talk(*asked), system="be kind")
    assert sample.ids == encode(small, CHATML, talk(("system", "be kind"), *asked))[0].ids
    (sample,) = encode(small, CHATML, talk(("system", ""), *asked), system="be kind")
    assert sample.ids == encode(small, CHATML, talk(("system", ""), *asked))[0].ids


def test_an_answer_without_an_end_token_is_trained_to_its_last_visible_token(small: Tokenizer) -> None:
    template = "{% for m in messages %}{{ m.role + ':' + m.content }}\n\n\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    conversation = talk(("user", "hello"), ("assistant", "hi no"), ("user", "and"), ("assistant", "yes"))
    (sample,) = encode_turns(small, template, conversation, stop=["<|im_end|>"])
    assert small.decode(np.array(sample.ids)[sample.trained]) == "hi noyes"
    (sample,) = encode_turns(small, template, conversation, stop=["<|im_end|>"], after_end=True)
    assert small.decode(np.array(sample.ids)[sample.trained]) == "hi no\n\n\nyes\n\n\n"
    (sample,) = encode_turns(small, template, conversation, stop=[], document_end=True)
    assert small.decode(np.array(sample.ids)[sample.trained], skip_special=False) == "hi noyes</s>"


def test_a_template_whose_prompt_is_no_beginning_is_refused_with_where_they_part(small: Tokenizer) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
    with pytest.raises(DataError, match=r"of message 1 isn't .* They part at character 5: 'answer:' and 'hi'"):
        encode_turns(small, template, talk(("user", "hello"), ("assistant", "hi")), stop=[])
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(NoAnswer, match="the chat template says nothing of message 1"):
        encode_turns(small, silent, talk(("user", "hello"), ("assistant", "hi")), stop=[])
    with pytest.raises(DataError, match="has no token '<eoa>'"):
        encode_turns(small, CHATML.template, talk(("user", "hello"), ("assistant", "hi")), stop=["<eoa>"])
