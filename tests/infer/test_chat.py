from pathlib import Path

import pytest
import torch
from in_memory import greedy

from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError, UserError
from ternlm.convert.weights import OpenModel
from ternlm.data.chat import INTERNLM, INTERNLM2, encode_chat
from ternlm.data.tokenizer import Tokenizer, train_bpe
from ternlm.infer.chat import Chat, start_chat
from ternlm.infer.engine import generate
from ternlm.infer.params import SamplingParams
from ternlm.model.decoder import CausalLM, build_model

MARKS = ("<unk>", "<s>", "</s>", "<eoh>", "<eoa>")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(["hello there, how do you do? 你好"] * 30), 275, MARKS)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> CausalLM:
    torch.manual_seed(1)
    model = build_model(config(tokenizer))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(preset="tiny", vocab_size=tokenizer.vocab_size, max_position_embeddings=160)


def begin(model: CausalLM, tokenizer: Tokenizer | None, params: SamplingParams | None = None, **changes) -> Chat:
    opened = OpenModel(Path("m"), model.config, None, tokenizer, changes.pop("facts", {}))  # type: ignore[arg-type]
    return start_chat(opened, model, params or greedy(9), **changes)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_an_answer_streams_and_the_next_one_builds_on_it(model, tokenizer) -> None:
    chat, messages = begin(model, tokenizer), [{"role": "system", "content": "be kind"}]
    for question in ("hello", "how?"):
        messages.append(user(question))
        prompt = encode_chat(tokenizer, INTERNLM.template, messages)
        (tokens,) = generate(model, [prompt], chat.params)
        pieces = list(chat.answer(messages))
        assert len(pieces) > 1
        assert "".join(pieces) == tokenizer.decode(tokens)
        messages.append({"role": "assistant", "content": "".join(pieces)})


def test_a_question_asked_again_is_answered_otherwise(model, tokenizer) -> None:
    def answers() -> list[str]:
        chat = begin(model, tokenizer, SamplingParams(max_new_tokens=9, seed=3))
        return ["".join(chat.answer([user("hello")])) for _ in range(3)]

    first = answers()
    assert len(set(first)) == 3
    assert answers() == first


def test_the_models_own_template_and_ends_are_taken(model, tokenizer) -> None:
    facts = {"chat_template": "{{ messages[-1].content }}", "generation": {"eos_token_id": [7, 9]}}
    chat = begin(model, tokenizer, facts=facts)
    assert chat.template == facts["chat_template"]
    assert chat.params.stop_ids == {7, 9, tokenizer.eos_id}
    assert begin(model, tokenizer, facts=facts, protocol="internlm").template == INTERNLM.template


def test_the_tokenizer_tells_the_protocol_where_nothing_else_does(model, tokenizer) -> None:
    chat = begin(model, tokenizer)
    assert chat.template == INTERNLM.template
    assert chat.params.stop_ids == {tokenizer.id_of("<eoa>"), tokenizer.eos_id}
    plain = train_bpe(iter(["hello there"] * 9), 262)
    with pytest.raises(ConfigError, match=r"doesn't tell how it was trained to chat; choose a protocol, internlm or"):
        begin(model, plain)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        begin(model, None)
    assert INTERNLM2.stop[0] == "<|im_end|>"


def test_a_full_conversation_says_so_and_an_answer_may_be_left(model, tokenizer) -> None:
    chat = begin(model, tokenizer)
    whole = "".join(chat.answer([user("hello")]))
    with pytest.raises(ConfigError, match=r"there is room for 160; begin a new one"):
        list(chat.answer([user("hello " * 200)]))
    answer = chat.answer([user("hello")])
    assert whole.startswith(next(answer))
    answer.close()
    assert "".join(chat.answer([user("hello")])) == whole


def test_a_model_of_which_nothing_finite_comes_is_told(tokenizer) -> None:
    broken = build_model(config(tokenizer))
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    chat = begin(broken, tokenizer)
    for _ in range(2):  # the first leaves nothing behind
        with pytest.raises(UserError, match="logits are not finite; its weights are broken"):
            list(chat.answer([user("hello")]))
