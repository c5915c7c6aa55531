"""The tokenizer in an exported folder gives transformers the ids that the model was trained with."""

import os
from pathlib import Path

import pytest
from in_memory import Ones

from ternlm.config.model import ModelConfig
from ternlm.convert.detect import open_foreign
from ternlm.convert.export_hf import export_hf
from ternlm.convert.weights import OpenModel
from ternlm.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

transformers = pytest.importorskip("transformers")
SHARED = Path(os.environ.get("TERNLM_SHARED", Path(__file__).parents[3] / "shared")) / "data"
TEXTS = [
    "Hello, world! It's 3.14159 o'clock.",
    "  two spaces,\n\n\ttabs\r\n and trailing  ",
    "def f(x):\n    return {'a': x ** 2}  # 注释\n",
    "今天天气很好，我们去公园吧。𠮷野家",
    "🙂👩‍👩‍👧 naïve Ünïcödé ﬁ №",
    "",
]


def export(tokenizer: Tokenizer, folder: Path) -> Path:
    config = ModelConfig(preset="tiny", vocab_size=tokenizer.vocab_size, hidden_size=8, num_hidden_layers=1)
    export_hf(OpenModel(folder, config, Ones(config), tokenizer), folder / "hf")
    return folder / "hf"


def check(tokenizer: Tokenizer, folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.bos_token_id == tokenizer.bos_id
    assert theirs.eos_token_id == tokenizer.eos_id
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode(text), text
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), text
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert theirs.encode("a") == bos + tokenizer.encode("a")  # as a document begins in training
    again = open_foreign(folder).tokenizer
    assert again is not None
    assert again.fingerprint == tokenizer.fingerprint


def test_of_a_bpe_trained_here(tmp_path: Path) -> None:
    check(tokenizer := train_bpe(iter(TEXTS * 20), 300), export(tokenizer, tmp_path))


@pytest.mark.parametrize("name", ["internlm_v7_sft.model", "internlm2_tokenizer.model"])
def test_of_internlm(name: str, tmp_path: Path) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} isn't there")
    tokenizer = load_tokenizer(SHARED / name)
    folder = export(tokenizer, tmp_path)
    check(tokenizer, folder)
    assert (folder / "tokenizer.model").read_bytes() == (SHARED / name).read_bytes()
