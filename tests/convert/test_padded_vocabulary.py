"""A vocabulary padded past the tokenizer's keeps its rows, and its logits, through every format."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf_models import built, next_logprobs, random_model, small_config, small_tokenizer

from ternlm.convert.detect import open_foreign
from ternlm.convert.export_hf import export_hf
from ternlm.convert.gguf_write import export_gguf
from ternlm.train.models import import_model, open_model

TOKENS = [5, 77, 300, 12, 5, 8, 190, 222, 45, 99, 100, 7]


@pytest.mark.parametrize("tied", [False, True])
def test_a_padded_vocabulary_comes_through(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = small_tokenizer(310)
    model = random_model(small_config(vocab_size=384, tie_word_embeddings=tied), tokenizer)
    export_hf(model, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "checkpoint")
    export_gguf(open_model(tmp_path / "checkpoint"), tmp_path / "model.gguf", "float32")
    for again in (
        open_foreign(tmp_path / "hf"),
        open_model(tmp_path / "checkpoint"),
        open_model(tmp_path / "model.gguf"),
    ):
        assert again.config == model.config
        assert again.tokenizer is not None
        assert again.tokenizer.vocab_size == 310
        for name in model.weights.names():
            assert torch.equal(again.weights.read(name), model.weights.read(name)), (again.path, name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")) == 310
    with torch.no_grad():
        wanted = theirs(torch.tensor([TOKENS])).logits[0, -1]
    assert wanted.shape == (384,)
    found = next_logprobs(built(replace(again, tokenizer=None)), TOKENS)
    assert float((found - wanted.log_softmax(-1)).abs().max()) < 1e-5
