import dataclasses
import logging
import os
import tempfile
import weakref
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch
from gguf_models import (
    FAMILIES,
    TEXT,
    TEXTS,
    LlamaCpp,
    built,
    largest_difference,
    next_logprobs,
    question,
    random_model,
    repack,
    small_config,
    small_tokenizer,
    smollm2,
)
from in_memory import Held

from ternlm.convert.gguf_read import open_gguf
from ternlm.convert.gguf_write import write_gguf
from ternlm.convert.weights import ConvertError
from ternlm.data.sentencepiece import BYTE, UNUSED
from ternlm.data.tokenizer import Tokenizer, load_tokenizer

SHARED = Path(os.environ.get("TERNLM_SHARED", Path(__file__).parents[3] / "shared")) / "data"
PROMPT = [5, 77, 300, 12, 5, 8, 190, 222, 45, 99, 100, 7]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_bit_by_bit(tmp_path, family, dtype):
    model = random_model(small_config(**FAMILIES[family]), small_tokenizer(), getattr(torch, dtype))
    write_gguf(model, tmp_path / "model.gguf", dtype)
    again = open_gguf(tmp_path / "model.gguf")
    assert again.config == model.config
    assert list(again.weights.names()) == list(model.weights.names())
    for name in model.weights.names():
        was, now = model.weights.read(name), again.weights.read(name)
        assert now.dtype == (was.dtype if was.dim() > 1 else torch.float32), name
        assert torch.equal(now.float(), was.float()), name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_agrees_with_us(tmp_path, family, dtype):
    model = random_model(small_config(**FAMILIES[family]), small_tokenizer(), getattr(torch, dtype))
    write_gguf(model, tmp_path / "model.gguf", dtype)
    top = LlamaCpp(tmp_path / "model.gguf").next_logprobs(PROMPT)
    assert largest_difference(top, next_logprobs(built(model), PROMPT)) < 0.01


@pytest.mark.parametrize(
    "scaling",
    [
        dict(kind="linear", factor=4.0),
        dict(kind="yarn", factor=4.0, original_max_position_embeddings=64),
        dict(kind="yarn", factor=2.0, attention_factor=1.3),
    ],
)
def test_llama_cpp_scales_positions_as_we_do(tmp_path, scaling):
    model = random_model(small_config(rope_scaling=scaling), small_tokenizer())
    write_gguf(model, tmp_path / "model.gguf", "float32")
    assert open_gguf(tmp_path / "model.gguf").config == model.config
    prompt = PROMPT * 8
    top = LlamaCpp(tmp_path / "model.gguf").next_logprobs(prompt)
    assert largest_difference(top, next_logprobs(built(model), prompt)) < 0.01


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory):
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "lines.txt").write_text("\n".join([TEXT, *TEXTS] * 4))
    spm.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / "tokenizer"), minloglevel=2, model_type="bpe",
        vocab_size=450, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=0.98,
    )  # fmt: skip
    return load_tokenizer(folder / "tokenizer.model")


def test_a_sentencepiece_tokenizer_keeps_its_ids(tmp_path, sentencepiece_tokenizer):
    tokenizer = sentencepiece_tokenizer
    write_gguf(random_model(small_config(vocab_size=480), tokenizer), tmp_path / "model.gguf")
    again, client = open_gguf(tmp_path / "model.gguf").tokenizer, LlamaCpp(tmp_path / "model.gguf")
    assert (again.kind, again.vocab_size) == ("sentencepiece", tokenizer.vocab_size)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert again.fingerprint == tokenizer.fingerprint
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) == client.tokenize(text), text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "vocab_size"), [("internlm_v7_sft", 103168), ("internlm2_tokenizer", 92544)])
def test_internlms_tokenizers_keep_their_ids(tmp_path, name, vocab_size):
    if not (SHARED / f"{name}.model").exists():
        pytest.skip(f"{SHARED / name}.model isn't there")
    tokenizer = load_tokenizer(SHARED / f"{name}.model")
    write_gguf(random_model(small_config(vocab_size=vocab_size), tokenizer), tmp_path / "model.gguf")
    again, client = open_gguf(tmp_path / "model.gguf").tokenizer, LlamaCpp(tmp_path / "model.gguf")
    assert again.fingerprint == tokenizer.fingerprint
    for text in [*TEXTS, " lead", "a\0b", "<|User|>:hi<eoh>\n<|Bot|>:", "🐉"]:
        assert again.encode(text) == tokenizer.encode(text) == client.tokenize(text), text


def test_pieces_that_are_unused_are_never_found_in_text(tmp_path, sentencepiece_tokenizer):
    """As files of InternLM2 have them, between others, and a character in the place of NUL that is typed as a byte."""
    tokenizer = sentencepiece_tokenizer
    write_gguf(random_model(small_config(vocab_size=450), tokenizer), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    word, letter = next(token for token in tokens[300:] if len(token) == 2), tokens.index("e")
    types[tokens.index(word)], types[letter], tokens[letter] = UNUSED, BYTE, "🐉"
    changes = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__token_type": types}
    again = open_gguf(repack(tmp_path / "model.gguf", tmp_path / "unused.gguf", **changes)).tokenizer
    assert tokens.index(word) in tokenizer.encode(word)
    assert tokens.index(word) not in again.encode(word)
    assert again.encode("🐉")[-4:] == [again.id_of(f"<0x{byte:02X}>") for byte in "🐉".encode()]


def test_a_byte_level_tokenizer_keeps_its_ids(tmp_path):
    tokenizer = small_tokenizer()
    write_gguf(random_model(small_config(), tokenizer), tmp_path / "model.gguf")
    again, client = open_gguf(tmp_path / "model.gguf").tokenizer, LlamaCpp(tmp_path / "model.gguf")
    assert (again.kind, again.vocab_size) == ("tokenizers", tokenizer.vocab_size)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) == client.tokenize(text), text


def test_tokens_added_on_top_of_a_tokenizer_are_written(tmp_path, sentencepiece_tokenizer):
    sentencepiece_tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.add_special_tokens(["<|im_start|>"])
    backend.save(str(file))
    tokenizer = load_tokenizer(tmp_path)
    write_gguf(random_model(small_config(vocab_size=480), tokenizer), tmp_path / "model.gguf")
    again = open_gguf(tmp_path / "model.gguf").tokenizer
    assert again.special_ids == tokenizer.special_ids
    assert again.id_of("<|im_start|>") == tokenizer.id_of("<|im_start|>") == 450


def test_facts_are_written(tmp_path):
    facts = {"chat_template": "{{ messages }}", "generation": {"bos_token_id": 0, "eos_token_id": [1, 2]}}
    write_gguf(random_model(small_config(), small_tokenizer(), **facts), tmp_path / "model.gguf")
    assert open_gguf(tmp_path / "model.gguf").facts == facts


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    model = random_model(small_config())
    model.weights.tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    with pytest.raises(ConvertError, match=r"up_proj.weight has 1e\+06, too large for float16; write it as bfloat16"):
        write_gguf(model, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []
    write_gguf(model, tmp_path / "model.gguf", "bfloat16")


def test_the_library_says_nothing_of_a_good_file_and_other_loggers_are_left_alone(tmp_path, caplog, request):
    own = logging.getLogger("gguf")
    request.addfinalizer(lambda level=own.level: own.setLevel(level))
    own.setLevel(logging.NOTSET)
    caplog.set_level(logging.INFO)
    write_gguf(random_model(small_config(), small_tokenizer()), tmp_path / "model.gguf")
    open_gguf(tmp_path / "model.gguf")
    assert [record for record in caplog.records if record.name.startswith("gguf")] == []
    logging.getLogger("gguf.gguf_writer").warning("a warning")
    logging.getLogger("ternlm").info("ours")
    assert [record.message for record in caplog.records] == ["a warning", "ours"]
    own.setLevel(logging.INFO)
    write_gguf(random_model(small_config()), tmp_path / "told.gguf")
    assert any(record.name.startswith("gguf") for record in caplog.records[2:])


def test_one_tensor_at_a_time_is_held(tmp_path):
    held, most = set(), [0]

    class Watched(Held):
        def read(self, name, offset=None, shape=None):
            tensor = self.tensors[name].clone()
            held.add(name)
            most[0] = max(most[0], len(held))
            weakref.finalize(tensor, held.discard, name)
            return tensor

    model = random_model(small_config(num_hidden_layers=4))
    write_gguf(dataclasses.replace(model, weights=Watched(model.weights.tensors)), tmp_path / "model.gguf")
    assert most[0] <= 2  # the next one is read before the last is let go


def unlike_any_other():
    """A tokenizer that splits text in no way known."""
    backend = tokenizers.Tokenizer.from_str(tokenizer_json(small_tokenizer()))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    return Tokenizer(backend.to_str())


def tokenizer_json(tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return (Path(folder) / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("model", "dtype", "message"),
    [
        (lambda: random_model(small_config()), "int8", "dtype = 'int8' can't be written; choose one of float32"),
        (
            lambda: random_model(small_config(rope_scaling=dict(kind="dynamic", factor=2.0))),
            "float16",
            "'dynamic' can't be said in GGUF.*set it to 'yarn', 'linear' or 'default'",
        ),
        (
            lambda: random_model(small_config(rope_scaling=dict(kind="yarn", factor=2.0, beta_fast=24.0))),
            "float16",
            "beta_fast = 24.0",
        ),
        (lambda: random_model(small_config(qk_norm=True, attention_bias=True)), "float16", "qk_norm"),
        (lambda: random_model(small_config(vocab_size=300), small_tokenizer()), "float16", "310 tokens.*300"),
        (lambda: random_model(small_config(), unlike_any_other()), "float16", "how its tokenizer splits text"),
        (
            lambda: random_model(small_config(), small_tokenizer(), generation={"eos_token_id": [1, 2, 3, 4]}),
            "float16",
            "at most 3 end tokens",
        ),
        (
            lambda: dataclasses.replace(random_model(small_config()), config=small_config(attention_bias=True)),
            "float16",
            "misses model.layers.0.self_attn.k_proj.bias",
        ),
    ],
)
def test_what_cant_be_written_is_refused(tmp_path, model, dtype, message):
    with pytest.raises(ConvertError, match=message):
        write_gguf(model(), tmp_path / "model.gguf", dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_real_model_imported_and_exported_answers_in_llama_cpp(tmp_path):
    model = open_gguf(smollm2())
    write_gguf(model, tmp_path / "model.gguf", "float16")
    again, client = open_gguf(tmp_path / "model.gguf"), LlamaCpp(tmp_path / "model.gguf", context=512)
    assert (again.config, again.facts) == (model.config, model.facts)
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
    tokens = question(model.tokenizer)
    assert client.complete(tokens, 20) == "The capital of France is Paris."
    assert largest_difference(client.next_logprobs(tokens), next_logprobs(built(again), tokens)) < 0.01
