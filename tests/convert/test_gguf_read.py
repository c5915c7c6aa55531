import struct
import sys

import gguf
import gguf.quants
import pytest
import torch
from gguf_models import (
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
from in_memory import greedy

from ternlm.convert.gguf_read import open_gguf
from ternlm.convert.gguf_write import write_gguf
from ternlm.convert.weights import ConvertError, cut
from ternlm.infer.engine import generate

PROMPT = [5, 77, 300, 12, 5, 8, 190, 222, 45, 99, 100, 7]
QUANTIZED = ["Q8_0", "Q4_0", "Q4_1"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A float32 file, and the model that is in it."""
    model = random_model(small_config(attention_bias=True), small_tokenizer())
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    write_gguf(model, path, "float32")
    return path, model


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_what_gguf_dequantizes(tmp_path, plain, kind):
    path, model = plain
    weights = open_gguf(repack(path, tmp_path / "quantized.gguf", kind)).weights
    quantized = gguf.GGMLQuantizationType[kind]
    for name in model.weights.names():
        ours = model.weights.read(name)
        if ours.dim() == 2:
            content = gguf.quants.quantize(ours.numpy(), quantized)
            ours = torch.from_numpy(gguf.quants.dequantize(content, quantized))
        assert torch.equal(weights.read(name), ours), name


@pytest.mark.parametrize("kind", [None, *QUANTIZED])
def test_a_part_of_a_tensor_is_that_part(tmp_path, plain, kind):
    weights = open_gguf(repack(plain[0], tmp_path / "model.gguf", kind)).weights
    for name in weights.names():
        shape = weights.shape(name)
        for offset, part in [
            ((0,) * len(shape), shape),
            (tuple(size // 4 for size in shape), tuple(size // 2 for size in shape)),
            (tuple(size - 7 for size in shape), (7,) * len(shape)),
            (tuple(size // 3 for size in shape), (1,) * len(shape)),
        ]:
            assert torch.equal(weights.read(name, offset, part), cut(weights.read(name), offset, part)), name


def test_only_the_rows_asked_for_are_dequantized(tmp_path, plain, monkeypatch):
    weights = open_gguf(repack(plain[0], tmp_path / "model.gguf", "Q8_0")).weights
    sizes, dequantize = [], gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda data, kind: sizes.append(data.size) or dequantize(data, kind))
    weights.read("model.layers.0.self_attn.q_proj.weight", (8, 40), (3, 8))
    assert sizes == [3 * 34]  # 34 bytes are a block of 32 values


def test_qwen2_has_its_own_row_order_and_no_bias_on_o(tmp_path, plain):
    path, model = plain
    missing = [f"blk.{layer}.attn_output.bias" for layer in range(2)]
    again = open_gguf(repack(path, tmp_path / "qwen2.gguf", architecture="qwen2", without=missing))
    assert again.config == model.config
    name = "model.layers.1.self_attn.o_proj.bias"
    assert torch.equal(again.weights.read(name), torch.zeros(64))
    assert again.weights.read(name, (3,), (5,)).shape == (5,)
    top = LlamaCpp(again.path).next_logprobs(PROMPT)
    assert largest_difference(top, next_logprobs(built(again), PROMPT)) < 0.01


def test_internlm2_is_read_as_llama_cpp_does(tmp_path):
    write_gguf(random_model(small_config(), small_tokenizer()), tmp_path / "llama.gguf", "float32")
    again = open_gguf(repack(tmp_path / "llama.gguf", tmp_path / "internlm2.gguf", architecture="internlm2"))
    top = LlamaCpp(again.path).next_logprobs(PROMPT)
    assert largest_difference(top, next_logprobs(built(again), PROMPT)) < 0.01


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "default", "llama-bpe", "qwen2"])
def test_words_are_split_as_llama_cpp_does(tmp_path, plain, pre):
    # Without the last merges their tokens are in the vocabulary alone, which is enough for Llama 3's kind.
    merges = gguf.GGUFReader(plain[0]).fields["tokenizer.ggml.merges"].contents()[:-15]
    path = repack(plain[0], tmp_path / "model.gguf", tokenizer__ggml__pre=pre, tokenizer__ggml__merges=merges)
    tokenizer, client = open_gguf(path).tokenizer, LlamaCpp(path)
    for text in [*TEXTS, "  x\n\n y 1234567 ''s 'S don't <s></s> a\tb \r\n ", "١٢٣ ½ ²³ ǅ ß-_=+"]:
        assert tokenizer.encode(text) == client.tokenize(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_template_and_ends_are_told(tmp_path, plain):
    path = repack(
        plain[0], tmp_path / "model.gguf", tokenizer__ggml__eot_token_id=2, tokenizer__chat_template="{{ messages }}"
    )
    model = open_gguf(path)
    assert model.facts == {
        "chat_template": "{{ messages }}",
        "generation": {"bos_token_id": 0, "eos_token_id": [1, 2]},
    }
    assert (model.tokenizer.bos_id, model.tokenizer.eos_id, model.tokenizer.special_ids) == (0, 1, {0, 1, 2})


def test_a_bos_that_texts_dont_begin_with_is_only_told(tmp_path, plain):
    model = open_gguf(repack(plain[0], tmp_path / "model.gguf", tokenizer__ggml__add_bos_token=False))
    assert model.tokenizer.bos_id is None
    assert model.facts["generation"]["bos_token_id"] == 0


def test_a_model_without_tokenizer_is_read(tmp_path):
    model = random_model(small_config())
    write_gguf(model, tmp_path / "model.gguf")
    again = open_gguf(tmp_path / "model.gguf")
    assert again.tokenizer is None
    assert again.config == model.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(architecture="gemma"), "architecture 'gemma' isn't supported"),
        (dict(extra={"rope_freqs.weight": [1.0] * 7}), "rope_freqs.weight of (7,) must be 8 numbers from 1"),
        (dict(extra={"rope_freqs.weight": [1.0] * 7 + [0.5]}), "must be 8 numbers from 1"),
        (dict(extra={"rope_freqs.weight": [1.0, 9.0] * 4}), "isn't what Llama 3.1's scaling makes"),
        (
            dict(extra={"rope_freqs.weight": [1.0] * 7 + [8.0]}, llama__rope__scaling__type="yarn"),
            "rope_freqs.weight in the architecture llama with rope scaling 'yarn'",
        ),
        (
            dict(extra={"rope_freqs.weight": [1.0] * 7 + [8.0]}, architecture="qwen2"),
            "in the architecture qwen2 with",
        ),
        (dict(extra={"blk.0.ffn_gate_inp.weight": [1.0] * 8}), "has, beyond the model's, blk.0.ffn_gate_inp.weight"),
        (dict(without=["blk.1.attn_norm.weight"]), "misses model.layers.1.input_layernorm.weight"),
        (dict(without=["token_embd.weight"]), "is it a language model"),
        (dict(llama__expert_count=8), "mixture of experts"),
        (dict(split__count=3), "llama-gguf-split"),
        (dict(llama__embedding_length=128), "its configuration makes it"),
        (dict(llama__block_count=4_000_000_000), "block_count is 4000000000"),
        (dict(llama__context_length=None), "llama.context_length is missing"),
        (dict(llama__rope__dimension_count=8), "differs from the size of a head"),
        (dict(llama__attention__head_count=3, llama__attention__head_count_kv=2), "must divide"),
        (dict(llama__rope__scaling__type="longrope"), "'longrope'"),
        (dict(tokenizer__ggml__model="bert"), "tokenizer is 'bert'"),
        (dict(tokenizer__ggml__pre="chatglm-bpe"), "splits words as 'chatglm-bpe'"),
        (dict(tokenizer__ggml__merges=None), "misses 'tokenizer.ggml.merges'"),
    ],
)
def test_what_cant_be_read_is_refused(tmp_path, plain, changes, message):
    path = repack(plain[0], tmp_path / "model.gguf", **changes)
    with pytest.raises(ConvertError, match=message.replace("(", r"\(").replace(")", r"\)")) as error:
        open_gguf(path)
    assert str(path) in str(error.value)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ConvertError, match="not a GGUF file"):
        open_gguf(tmp_path / "model.gguf")
    with pytest.raises(ConvertError, match="no such file"):
        open_gguf(tmp_path / "other.gguf")


@pytest.mark.parametrize("version", [1, 0x03000000])
def test_another_version_is_refused(tmp_path, version):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<I", version) + bytes(100))
    with pytest.raises(ConvertError, match=f"version {version}"):
        open_gguf(tmp_path / "model.gguf")


def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(tmp_path, plain):
    content = plain[0].read_bytes()
    for size in [4, 7, 20, 100, 1000, 5000, len(content) // 2, len(content) - 40]:
        (tmp_path / "model.gguf").write_bytes(content[:size])
        with pytest.raises(ConvertError, match=r"cut off.*fetch it again"):
            open_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("number", [250, 9])  # none, and Q8_1, which isn't for weights
def test_an_unknown_quantization_is_refused(tmp_path, plain, number):
    content = bytearray(plain[0].read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", number)
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConvertError, match=r"blk.0.ffn_up.weight is of a type that can't be read"):
        open_gguf(tmp_path / "model.gguf")


def test_without_the_package_the_remedy_is_told(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConvertError, match=r"pip install 'ternlm\[hf\]'"):
        open_gguf(plain[0])


def test_a_real_tokenizer_gives_llama_cpps_ids():
    path = smollm2()
    tokenizer, client = open_gguf(path).tokenizer, LlamaCpp(path)
    for text in TEXTS:
        assert tokenizer.encode(text) == client.tokenize(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_a_real_model_knows_the_capital_of_france():
    model = open_gguf(smollm2())
    end = model.tokenizer.id_of("<|im_end|>")
    assert model.facts["generation"]["eos_token_id"] == [end]
    params = greedy(20, [end])
    (answer,) = generate(built(model), [question(model.tokenizer)], params)
    assert model.tokenizer.decode(answer) == "The capital of France is Paris."
