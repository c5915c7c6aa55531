"""sentencepiece models give the same ids and texts as the sentencepiece package itself."""

import json
import os
import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternlm.data.errors import DataError
from ternlm.data.sentencepiece import parse_model
from ternlm.data.tokenizer import load_tokenizer

spm = pytest.importorskip("sentencepiece")

SHARED = Path(os.environ.get("TERNLM_SHARED", Path(__file__).parents[3] / "shared")) / "data"
V7, V2 = SHARED / "internlm_v7_sft.model", SHARED / "internlm2_tokenizer.model"
needs_shared = pytest.mark.skipif(not V7.exists(), reason="the shared models and texts aren't here")


@pytest.fixture(scope="module", params=[V7, V2], ids=["internlm", "internlm2"])
def pair(request):
    return load_tokenizer(request.param), spm.SentencePieceProcessor(model_file=str(request.param))


@pytest.fixture(scope="module")
def counts(pair):
    return pair[0].token_bytes()


def real_lines():
    """Lines of Chinese, English and code, over a thousand each."""
    lines = []
    for name in ("alpaca_zh_demo.json", "alpaca_en_demo.json"):
        records = json.loads((SHARED / "alpaca" / name).read_text("utf-8"))
        lines += [line for r in records for line in (r["instruction"] + "\n" + r["output"]).split("\n")][:1200]
    problems = (SHARED / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()[:600]
    lines += [text for line in problems for text in json.loads(line).values()]
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "typing.py", "heapq.py"):
        lines += (library / name).read_text("utf-8").splitlines(keepends=True)
    return lines


@needs_shared
def test_ids_equal_sentencepieces_on_chinese_english_and_code(pair):
    ours, theirs = pair
    lines = real_lines()
    assert len(lines) > 5000
    assert ours.encode_batch(lines) == theirs.encode(lines)
    whole = "\n".join(lines[:2000])
    assert ours.encode(whole) == theirs.encode(whole)


@needs_shared
def test_decoding_gives_the_text_back_and_bytes_add_up(pair, counts):
    ours, _ = pair
    for line, ids in zip(lines := real_lines()[::3], ours.encode_batch(lines), strict=True):
        assert ours.decode(ids) == line
        assert counts[ids].sum() == len(line.encode())


@needs_shared
@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=40))
def test_ids_equal_sentencepieces_on_any_text(pair, counts, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text
    assert counts[ids].sum() == len(text.encode())


@needs_shared
def test_ids_equal_sentencepieces_where_merges_compete(pair):
    ours, theirs = pair
    random.seed(2)
    texts = [sign * count for sign in " =-\t\n.哈" for count in range(1, 200, 3)]
    for _ in range(1500):
        parts = (random.choice(" \n\t()[].,-=*ia1的——\0") * random.randint(1, 12) for _ in range(12))
        texts.append("".join(parts))
    assert ours.encode_batch(texts) == theirs.encode(texts)


@needs_shared
def test_control_pieces_in_text_are_plain_and_user_defined_ones_are_found():
    ours = load_tokenizer(V7)
    theirs = spm.SentencePieceProcessor(model_file=str(V7))
    text = "<s>Hello<eoh>\n<|Bot|>:好<eoa></s><unk><0x0A>"
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert {103027, 103028} < set(ids)
    assert not ours.special_ids & set(ids)
    assert ours.id_of("<eoh>") == 103027
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (103168, 1, 2)
    assert ours.decode([1, *ids, 2]) == text


@needs_shared
def test_a_saved_copy_has_the_same_fingerprint_and_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(V7)
    ours.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == V7.read_bytes()
    again = load_tokenizer(tmp_path)
    assert (again.kind, again.fingerprint) == ("sentencepiece", ours.fingerprint)
    assert load_tokenizer(tmp_path / "tokenizer.model").fingerprint == ours.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "  细胞理论 and x = 1\n\n\tdef<eoh>"
    assert theirs(text)["input_ids"] == [1, *ours.encode(text)]
    assert theirs.decode(ours.encode(text)) == text


def train(folder, **options):
    """Train a sentencepiece model on some lines of this file's neighbours."""
    lines = folder / "lines.txt"
    lines.write_text("".join(Path(__file__).with_name(f"test_{n}.py").read_text() for n in ("tokenizer", "readers")))
    prefix = folder / "small"
    defaults = {"model_type": "bpe", "vocab_size": 500, "normalization_rule_name": "identity", "byte_fallback": True}
    spm.SentencePieceTrainer.train(input=str(lines), model_prefix=str(prefix), minloglevel=2, **(defaults | options))
    return prefix.with_suffix(".model")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["<eoh>", "return"],
        },
        {"remove_extra_whitespaces": False},
        {"byte_fallback": False},
        {"bos_id": -1, "eos_piece": "<end>", "pad_id": 3},
    ],
    ids=["prefix and spaces", "user-defined", "all spaces", "no bytes", "other specials"],
)
def test_models_trained_with_other_options_give_the_same_ids(tmp_path, options):
    file = train(tmp_path, **options)
    ours, theirs = load_tokenizer(file), spm.SentencePieceProcessor(model_file=str(file))
    random.seed(3)
    lines = (tmp_path / "lines.txt").read_text().splitlines(keepends=True)
    words = [*lines, "é", "细", "  ", "a", " <eoh>", "return", "\n", "<s>", "<end>", " =", "test_", "\t"]
    texts = ["".join(random.choices(words, k=random.randint(0, 6))) for _ in range(500)]
    assert ours.encode_batch(texts) == theirs.encode(texts)
    bos, eos = theirs.bos_id(), theirs.eos_id()
    assert (ours.bos_id, ours.eos_id) == (None if bos < 0 else bos, None if eos < 0 else eos)
    for text in texts[:100]:
        ids = theirs.encode(text)
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "its algorithm is unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it changes characters"),
        ({"user_defined_symbols": ["<eoh>"]}, "adds or removes spaces and has user-defined pieces"),
        ({"treat_whitespace_as_suffix": True}, "marks spaces at the end of words"),
    ],
)
def test_a_model_that_cannot_be_reproduced_exactly_is_refused(tmp_path, options, reason):
    with pytest.raises(DataError, match=reason):
        load_tokenizer(train(tmp_path, **options))


def test_a_model_cut_off_anywhere_is_an_error_or_a_smaller_model(tmp_path):
    content = train(tmp_path).read_bytes()
    for cut in range(0, len(content), 97):
        try:
            assert len(parse_model(content[:cut], "x").pieces) <= 500
        except DataError as error:
            assert str(error).startswith("x: ")  # noqa: PT017
