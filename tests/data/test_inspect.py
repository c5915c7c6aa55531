"""`inspect` shows counts, shards and documents, and finds what is damaged."""

import hashlib
import io
import json
import random

import numpy as np
import pytest
from rich.console import Console

from ternlm.data.errors import DataError
from ternlm.data.inspect import inspect
from ternlm.data.prepare import prepare
from ternlm.data.tokenizer import load_tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter(["the tern flies far"] * 9), 270).save(folder)
    return folder


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """40 documents, three to a shard."""
    lines = [json.dumps({"text": f"tern {number} [red] <s>"}) + "\n" for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(lines) + '{"text": ""}\n')
    prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", unit_bytes=80, workers=1)
    return tmp_path / "out"


@pytest.fixture
def bins(tmp_path, tokenizer):
    """Two documents as InternLM keeps them, the second with loss on its answer alone."""
    its = load_tokenizer(tokenizer)
    question = [-index for index in its.encode("question")]
    documents = [its.encode_document("xy"), [0, *question, *its.encode("answer"), 1]]
    lines = [json.dumps({"tokens": ids}) + "\n" for ids in documents]
    folder = tmp_path / "bins"
    folder.mkdir()
    (folder / "a.bin").write_text("".join(lines))
    with (folder / "a.bin.meta").open("wb") as file:
        np.save(file, np.array([[0, len(documents[0])], [len(lines[0]), len(documents[1])]]))
    return folder


def shown(path, color=False, **options):
    said = io.StringIO()
    system = "standard" if color else None
    console = Console(file=said, width=300, force_terminal=color, color_system=system, _environ={})
    inspect(path, console=console, **options)
    return said.getvalue()


def test_it_shows_counts_shards_and_documents_with_their_ends(prepared):
    text = shown(prepared, documents=2)
    assert "documents  40" in text
    assert "uint16, 16 shards" in text
    assert "tokenizers, vocabulary 270, bos 0, eos 1" in text
    assert "1 for empty text, the first: a.jsonl: a record with an empty text" in text
    assert "shard-00000" in text
    assert "shard-00015" in text
    assert "shard-00010" not in text
    assert "\n<s>tern 0 [red] <s></s>\n" in text
    assert "\n<s>tern 20 [red] <s></s>\n" in text
    assert text.count("\ndocument ") == 2


def test_special_tokens_stand_out_from_the_same_words_in_text(prepared):
    text = shown(prepared, documents=1, color=True)
    assert "\x1b[1;35m<s>\x1b[0mtern 0 [red] <s>\x1b[1;35m</s>\x1b[0m" in text


def test_long_documents_are_cut(prepared):
    assert "\n<s>tern ...\n" in shown(prepared, documents=1, chars=7)


def test_internlm_files_are_shown_as_ids_or_decoded_with_the_loss_mask(bins, tokenizer):
    plain = shown(bins)
    assert "InternLM .bin, 1 files" in plain
    assert "document 1: 14 tokens, 6 with loss" in plain
    decoded = shown(bins, tokenizer=tokenizer, color=True)
    assert "\x1b[2;3mquestion\x1b[0manswer" in decoded


def test_verify_passes_on_what_is_whole(prepared, bins, tokenizer):
    assert "verified: every file has its checksum, every id is in the vocabulary" in shown(prepared, verify=True)
    assert "verified: every line can be read\n" in shown(bins, verify=True)
    assert "every id is in the vocabulary" in shown(bins, verify=True, tokenizer=tokenizer)


def test_verify_finds_a_byte_that_changed(prepared):
    file = prepared / "shard-00003.tokens"
    content = bytearray(file.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    file.write_bytes(content)
    shown(prepared)
    with pytest.raises(DataError, match=r"shard-00003\.tokens: its SHA-256 is .* but manifest\.json says"):
        shown(prepared, verify=True)


def test_a_truncated_shard_is_an_error(prepared):
    file = prepared / "shard-00003.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"shard-00003\.tokens: .* the file was cut off or changed"):
        shown(prepared)


def test_an_id_outside_the_vocabulary_is_found_and_named(prepared):
    file = prepared / "shard-00000.tokens"
    file.write_bytes(file.read_bytes()[:-2] + (300).to_bytes(2, "little"))
    with pytest.raises(DataError, match=r"shard-00000\.tokens, document 2: id 300 is outside"):
        shown(prepared, documents=40)
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["shards"][0]["sha256"]["tokens"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"shard-00000\.tokens, document 2: id 300 is outside the vocabulary of 270"):
        shown(prepared, verify=True)


def test_an_id_of_internlm_files_outside_the_vocabulary_is_found_and_named(bins, tokenizer):
    file = bins / "a.bin"
    file.write_text(file.read_text().removesuffix("1]}\n") + "270]}\n")
    assert "verified: every line can be read\n" in shown(bins, verify=True)
    with pytest.raises(DataError, match=r"a\.bin:2 .*: id 270 is outside"):
        shown(bins, verify=True, tokenizer=tokenizer, documents=0)


def test_the_tokenizer_must_be_the_one_that_made_the_data(prepared, tmp_path):
    train_bpe(iter(["aa"]), 258).save(tmp_path / "other")
    with pytest.raises(DataError, match=r"was made by tokenizer .* use the tokenizer that made it"):
        shown(prepared, tokenizer=tmp_path / "other")


def test_wrong_choices_are_errors(prepared, tmp_path):
    with pytest.raises(DataError, match="chars = 0 at least 1"):
        shown(prepared, chars=0)
    with pytest.raises(DataError, match="no such file or folder"):
        shown(tmp_path / "nothing")
