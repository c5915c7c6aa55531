"""Text that keeps to a grammar: whatever is drawn, the whole is allowed, and it can end."""

import json
import random
import sys

import pytest
import torch
from chats import tokenizer_for

from ternlm.config.section import ConfigError
from ternlm.infer.constraint import Grammars
from ternlm.infer.request import GivenUp

CPU = torch.device("cpu")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["燕鸥", "tern"]},
        "far": {"type": "boolean"},
        "km": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "far", "km"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def draw(constraint, stop, rng, most=400):
    tokens = []
    while len(tokens) < most:
        ids = constraint.allowed().nonzero()[:, 0].tolist()
        token = stop if stop in ids else rng.choice(ids)
        if token == stop:
            return tokens
        constraint.accept(token)
        tokens.append(token)
    raise AssertionError("it never ended")


@pytest.mark.parametrize("name", ["internlm2", "chatml"])
def test_any_text_that_is_drawn_keeps_to_the_schema(name):
    pytest.importorskip("llguidance")
    tokenizer, rng = tokenizer_for(name), random.Random(0)
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 64, CPU)
    for _ in range(8):
        constraint = grammars.compile("start: %json " + json.dumps(SCHEMA), {tokenizer.eos_id})
        assert constraint.allowed().shape == (tokenizer.vocab_size + 64,)
        found = json.loads(tokenizer.decode(draw(constraint, tokenizer.eos_id, rng)))
        assert found["name"] in ("燕鸥", "tern")
        assert isinstance(found["far"], bool)
        assert isinstance(found["km"], int)


def test_special_tokens_stand_in_grammars_by_name():
    pytest.importorskip("llguidance")
    tokenizer = tokenizer_for("internlm2")
    start, end = (tokenizer.id_of(f"<|action_{name}|>") for name in ("start", "end"))
    grammars = Grammars(tokenizer, tokenizer.vocab_size, CPU)
    constraint = grammars.compile("start: <|action_start|> /[0-9]{3}/ <|action_end|>", {2})
    tokens = draw(constraint, 2, random.Random(0))
    assert (tokens[0], tokens[-1]) == (start, end)
    assert tokenizer.decode(tokens[1:-1]).isdecimal()


def test_after_the_end_nothing_but_an_end_may_come():
    pytest.importorskip("llguidance")
    tokenizer = tokenizer_for("chatml")
    constraint = Grammars(tokenizer, tokenizer.vocab_size, CPU).compile('start: "a"', {2, 0})
    constraint.accept(tokenizer.encode("a")[0])
    assert constraint.allowed().nonzero()[:, 0].tolist() == [0, 2]
    constraint.accept(tokenizer.encode("b")[0])  # which wasn't allowed
    with pytest.raises(GivenUp):
        constraint.allowed()


def test_a_grammar_that_takes_too_much_is_given_up_without_telling_its_text():
    pytest.importorskip("llguidance")
    tokenizer = tokenizer_for("chatml")
    schema = {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}
    constraint = Grammars(tokenizer, tokenizer.vocab_size, CPU).compile("start: %json " + json.dumps(schema), {2})
    with pytest.raises(GivenUp, match="a grammar was given up") as caught:
        for _ in range(200):
            constraint.accept(max(constraint.allowed().nonzero()[:, 0].tolist()))
    assert "aaa" not in str(caught.value)


@pytest.mark.parametrize("grammar", ["begin: 3", "start: <nope>", 'start: %json {"$ref": "http://a.b/c"}', "\ud800"])
def test_a_wrong_grammar_is_refused(grammar):
    pytest.importorskip("llguidance")
    tokenizer = tokenizer_for("chatml")
    with pytest.raises(ConfigError, match="the grammar can't be used"):
        Grammars(tokenizer, tokenizer.vocab_size, CPU).compile(grammar, {2})
    with pytest.raises(ConfigError, match="must be able to end"):
        Grammars(tokenizer, tokenizer.vocab_size, CPU).compile('start: "a"', ())


def test_without_the_library_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="pip install llguidance"):
        Grammars(tokenizer_for("chatml"), 49152, CPU)
