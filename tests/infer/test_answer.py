"""An answer out of events: what is told is settled, and stop strings and what follows them never are."""

import random

import pytest
from chats import tokenizer_for

from ternlm.data.tokenizer import train_bpe
from ternlm.infer.answer import Answer, StopStrings
from ternlm.infer.params import SamplingParams
from ternlm.infer.request import Event, Request
from ternlm.infer.sampling import Logprobs, make_generator
from ternlm.infer.text import TextStream

TEXT = "The tern 燕鸥 flies 🐦 far. END"


def request(prompt=(1,)):
    return Request(list(prompt), SamplingParams(), make_generator(0, prompt))


def events(tokens, finish="length"):
    own = request()
    for number, token in enumerate(tokens):
        yield Event(own, token, Logprobs(-float(number)), finish if number == len(tokens) - 1 else None)


def whole(deltas):
    return "".join(delta.text for delta in deltas), [each for delta in deltas for each in delta.said]


@pytest.mark.parametrize("stops", [["abc"], ["abc", "bd"], ["aab"], ["c", "abcabd"], ["zz"], ["xa", "ax"]])
def test_a_text_ends_before_its_first_stop_string_however_it_is_cut(stops):
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("abcdxz") for _ in range(rng.randrange(14)))
        places = [text.find(stop) for stop in stops if stop in text]
        expected = text[: min(places)] if places else text
        search, told, left = StopStrings(stops), "", text
        while left:
            size = rng.randrange(1, 4)
            piece, found = search.add(left[:size])
            told, left = told + piece, left[size:]
            assert expected.startswith(told)
            if found:
                break
        else:
            told += search.finish()
        assert told == expected


@pytest.mark.parametrize("name", ["internlm", "internlm2", "chatml"])
def test_streamed_random_ids_are_what_decoding_them_at_once_gives(name):
    tokenizer, rng = tokenizer_for(name), random.Random(3)
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    single = [i for i in ids if len(tokenizer.pieces[i]) == 1] if name == "chatml" else ids
    for case in range(40):
        prompt = tokenizer.encode("The tern ")[: rng.randrange(4)]
        tokens = [rng.choice(single if case % 3 == 0 else ids) for _ in range(rng.randrange(1, 80))]
        stream, pieces, left = TextStream(tokenizer, prompt), [], list(tokens)
        while left:
            size = rng.choice([1, 1, 1, 3])
            pieces.append(stream.add(left[:size]))
            del left[:size]
        pieces.append(stream.finish())
        assert "".join(pieces) == tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]


@pytest.mark.parametrize("name", ["internlm", "internlm2", "chatml"])
def test_streamed_texts_of_any_script_are_themselves(name):
    tokenizer = tokenizer_for(name)
    text = "𓀀𓁐 é 燕鸥飞得很远 🐦‍⬛ ⵣ  two  spaces\n\n\tand tabs ༀ"
    stream = TextStream(tokenizer, [])
    pieces = [stream.add([token]) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == text


def test_bytes_that_make_no_character_are_told_before_the_end():
    tokenizer = tokenizer_for("chatml")
    (bad,) = (i for i, piece in enumerate(tokenizer.pieces) if piece == b"\x80")
    stream = TextStream(tokenizer, tokenizer.encode("a"))
    told = "".join(stream.add([bad]) for _ in range(500))
    assert len(told) > 480
    assert told + stream.finish() == "\ufffd" * 500


def test_decoding_costs_the_same_for_each_token(monkeypatch):
    tokenizer = train_bpe(iter([TEXT]), 270)
    sizes = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **more: sizes.append(len(ids)) or decode(ids, **more))
    stream = TextStream(tokenizer, tokenizer.encode(TEXT * 40))
    tokens = tokenizer.encode(TEXT * 40)
    assert "".join(stream.add([token]) for token in tokens) == TEXT * 40
    assert max(sizes) < 50


def test_special_tokens_are_told_by_name_where_they_are_wanted():
    tokenizer = tokenizer_for("internlm2")
    mark = tokenizer.id_of("<|action_start|>")
    tokens = [*tokenizer.encode("call"), mark, *tokenizer.encode("x"), tokenizer.id_of("<|im_end|>"), 92600]
    assert TextStream(tokenizer, [1]).add(tokens) == "callx"
    assert TextStream(tokenizer, [1], [mark]).add(tokens) == "call<|action_start|>x"


def test_tokens_are_told_with_their_text_and_their_places_are_its():
    tokenizer = train_bpe(iter([TEXT]), 262)
    tokens = tokenizer.encode(TEXT)
    answer = Answer(tokenizer, [1])
    deltas = [answer.take(event) for event in events(tokens)]
    text, said = whole(deltas)
    assert (text, [each.token for each in said]) == (TEXT, tokens)
    assert [each.logprobs.token for each in said] == [-float(i) for i in range(len(tokens))]
    for number, each in enumerate(said):
        before = tokenizer.decode(tokens[:number])
        assert text[: each.place] == before.rstrip("\ufffd")
    assert [delta.finish for delta in deltas] == [None] * (len(tokens) - 1) + ["length"]
    assert sum(delta.num_tokens for delta in deltas) == len(tokens)


def test_a_stop_string_ends_the_answer_and_its_tokens_are_left_out():
    tokenizer = train_bpe(iter([TEXT]), 262)
    answer = Answer(tokenizer, [1], ["far. E", "鸥 fly"])
    deltas = [delta for event in events(tokenizer.encode(TEXT)) if (delta := answer.take(event))]
    text, said = whole(deltas)
    assert text == TEXT[: TEXT.index("far")]
    assert tokenizer.decode([each.token for each in said]).startswith(text)
    assert max(each.place for each in said) < len(text)
    assert deltas[-1].finish == "stop"
    assert sum(delta.num_tokens for delta in deltas) > len(said)
    assert answer.take(next(events([5]))) is None


def test_no_stop_string_is_looked_for_in_the_first_tokens():
    tokenizer = train_bpe(iter([TEXT]), 262)
    tokens = tokenizer.encode("ab ab ab")
    answer = Answer(tokenizer, [1], ["b"], min_new_tokens=3)
    text, _ = whole([delta for event in events(tokens) if (delta := answer.take(event))])
    assert text == "ab a"


def test_what_was_held_back_is_told_where_no_stop_string_came():
    tokenizer = train_bpe(iter([TEXT]), 262)
    answer = Answer(tokenizer, [1], ["END!"])
    deltas = [answer.take(event) for event in events(tokenizer.encode(TEXT))]
    assert whole(deltas)[0] == TEXT
    assert deltas[-1].text == "END"
    assert deltas[-2].said == ()


def test_the_first_delta_has_what_the_prompt_has():
    own = request([1, 5])
    own.prompt_logprobs, own.num_cached = [Logprobs(-2.0)], 16
    tokenizer = train_bpe(iter([TEXT]), 262)
    answer = Answer(tokenizer, own.prompt)
    first, second = (answer.take(Event(own, token, None, None)) for token in tokenizer.encode("ab"))
    assert (first.prompt_logprobs, first.num_cached) == ((Logprobs(-2.0),), 16)
    assert second.prompt_logprobs == ()
    ended = answer.take(Event(own, None, None, "cancelled"))
    assert (ended.finish, ended.text) == ("cancelled", "")
