"""Training, encoding, decoding, saving and loading tokenizers."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from ternlm.data.errors import DataError
from ternlm.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

TEXTS = [
    "def read(path):\n    with open(path) as file:\n        return file.read()\n",
    "The quick brown fox jumps over the lazy dog; it's 12345 times quicker than the dog.\n\n",
    "细胞理论是生物科学的一个理论，它认为所有生命体都是由微小的基本单元所构成。",
    "<s>struck</s> through, 😀 and \t tabs\r\n",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(TEXTS * 3), 400)


@given(st.text())
def test_bpe_gives_the_text_back_and_counts_its_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_training_again_gives_the_same_tokenizer_even_in_another_process(tokenizer):
    script = (
        "import sys, json; from ternlm.data.tokenizer import train_bpe; "
        "print(train_bpe(iter(json.loads(sys.argv[1]) * 3), 400).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.stdout.strip() == tokenizer.fingerprint


def test_a_document_has_bos_and_eos_around_it(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode_document("ab") == [0, *tokenizer.encode("ab"), 1]


def test_special_tokens_typed_in_text_are_plain_text(tokenizer):
    ids = tokenizer.encode("<s>x</s>")
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode([0, *ids, 1]) == "<s>x</s>"
    assert tokenizer.decode([0, *ids, 1], skip_special=False) == "<s><s>x</s></s>"


def test_digits_are_grouped_by_three(tokenizer):
    pieces = [tokenizer.token_of(index) for index in tokenizer.encode("1234567")]
    assert max(map(len, pieces)) <= 3
    assert len(set(tokenizer.encode("123")) & set(tokenizer.encode("123x"))) == len(tokenizer.encode("123"))


def test_a_batch_equals_its_texts_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(path)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
        assert (again.kind, again.bos_id, again.eos_id) == ("tokenizers", 0, 1)


def test_other_fields_of_tokenizer_config_survive_a_save(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    file = tmp_path / "a" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ x }}", "bos_token": None}))
    loaded = load_tokenizer(tmp_path / "a")
    assert loaded.bos_id is None
    assert loaded.fingerprint != tokenizer.fingerprint
    loaded.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"] == "{{ x }}"
    assert load_tokenizer(tmp_path / "b").fingerprint == loaded.fingerprint


def test_transformers_loads_the_folder_and_gives_the_same_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:3]:  # the fourth has special tokens in it, which transformers takes as such
        assert theirs(text)["input_ids"] == [0, *tokenizer.encode(text)]
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")


def test_truncation_in_a_tokenizer_file_does_not_cut_documents(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_bos_and_eos_of_known_names_are_found_without_a_config():
    backend = Backend(models.BPE(vocab={"a": 0, "<|endoftext|>": 1}, merges=[]))
    backend.add_special_tokens(["<|endoftext|>"])
    tokenizer = Tokenizer(backend.to_str())
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    assert tokenizer.encode_document("aa") == [0, 0, 1]


def test_an_id_outside_the_vocabulary_is_an_error(tokenizer):
    with pytest.raises(DataError, match="id 400 is outside the tokenizer's vocabulary of 400"):
        tokenizer.decode([5, 400])
    with pytest.raises(DataError, match="id -3 is outside"):
        tokenizer.decode([-3])


def test_an_unknown_token_is_an_error(tokenizer):
    assert tokenizer.id_of("</s>") == 1
    with pytest.raises(DataError, match="no token '<eoh>'"):
        tokenizer.id_of("<eoh>")


def test_too_small_a_vocabulary_and_too_little_text_are_errors():
    with pytest.raises(DataError, match=r"vocab_size = 257 is too small.*at least 258"):
        train_bpe(iter(TEXTS), 257)
    with pytest.raises(DataError, match=r"gave only 2.. tokens, not vocab_size = 5000"):
        train_bpe(iter(["only so much"]), 5000)


def test_a_special_token_that_the_text_would_teach_is_an_error():
    with pytest.raises(DataError, match="holds 'end' so often"):
        train_bpe(iter(["end of the endless end"] * 9), 262, ("<s>", "end"))


def test_files_that_are_no_tokenizers_are_errors(tmp_path):
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"holds no tokenizer.json and not just one .model file \(none\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="not a tokenizers JSON file"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"no protobuf at all")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"a tokenizer is a tokenizers .json or a sentencepiece .model file"):
        load_tokenizer(tmp_path / "x.txt")


def test_bytes_of_tokens_are_refused_where_the_spelling_is_unknown():
    backend = Backend(models.WordLevel(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    content = json.loads(backend.to_str()) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    with pytest.raises(DataError, match="decoder WordPiece"):
        Tokenizer(json.dumps(content)).token_bytes()


@pytest.mark.parametrize("name", ["encode", "encode_markup", "encode_typed"])
def test_others_go_on_while_a_long_text_is_encoded(name):
    tokenizer = train_bpe(iter(["the tern flies far"] * 20), 265)
    text, ended, longest = "the tern flies far, " * 100_000, threading.Event(), 0.0

    def watch():
        nonlocal longest
        last = time.perf_counter()
        while not ended.wait(0.002):
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    ids = getattr(tokenizer, name)(text)
    passed = time.perf_counter() - began
    ended.set()
    thread.join()
    assert longest < passed / 2
    assert ids == getattr(tokenizer, name)("the tern flies far, ") * 100_000
