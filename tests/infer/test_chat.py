import io
from pathlib import Path

import pytest
import torch
from in_memory import greedy

from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError
from ternlm.convert.weights import OpenModel
from ternlm.data.chat import INTERNLM, INTERNLM2, encode_chat
from ternlm.data.tokenizer import Tokenizer, train_bpe
from ternlm.infer.chat import Chat, start_chat
from ternlm.infer.engine import generate
from ternlm.infer.terminal import talk
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


def begin(model: CausalLM, tokenizer: Tokenizer | None, **changes) -> Chat:
    opened = OpenModel(Path("m"), model.config, None, tokenizer, changes.pop("facts", {}))  # type: ignore[arg-type]
    return start_chat(opened, model, greedy(9), **changes)


def test_an_answer_streams_and_becomes_part_of_the_conversation(model, tokenizer) -> None:
    chat = begin(model, tokenizer, system="be kind")
    for question in ("hello", "how?"):
        prompt = encode_chat(tokenizer, INTERNLM.template, [*chat.messages, {"role": "user", "content": question}])
        (tokens,) = generate(model, [prompt], chat.params)
        pieces: list[str] = []
        answer = chat.ask(question, pieces.append)
        assert "".join(pieces) == answer
        assert tokenizer.decode(tokens) == answer
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[-1]["content"] == answer


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


def test_a_full_conversation_says_so_and_stays_as_it_was(model, tokenizer) -> None:
    chat = begin(model, tokenizer)
    chat.ask("hello", lambda piece: None)
    before = list(chat.messages)
    with pytest.raises(ConfigError, match=r"the model was trained for 160; begin a new one"):
        chat.ask("hello " * 200, lambda piece: None)

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("hello", interrupt)
    assert chat.messages == before


def test_lines_are_questions_in_a_terminal(model, tokenizer, monkeypatch, capsys) -> None:
    chat = begin(model, tokenizer, system="be kind")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nhow?\n/new\nhello\n"))
    talk(chat)
    first, second, third = capsys.readouterr().out.rstrip("\n").split("\n")
    assert first == third != second
    assert [message["content"] for message in chat.messages] == ["be kind", "hello", first]
