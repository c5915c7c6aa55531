"""The servers that are measured: how each is started, in which environment, and what its requests must say."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

GREEDY = {"temperature": 0, "ignore_eos": True}
TOKENS = 16384
"""For whose keys and values each has memory: more than the loads need at once."""
TEXTS = 32
"""That each continues at the same time at most."""
LENGTH = 2048


@dataclass(frozen=True)
class Models:
    """SmolLM2-135M-Instruct as each kind of server loads it: the same weights."""

    folder: Path
    """Hugging Face's format, float32."""
    gguf: Mapping[str, Path]
    """By number format."""


@dataclass(frozen=True)
class Server:
    """One server: `arguments` behind its environment's python start it at a port."""

    label: str
    environment: str | None
    """None: TernLM's own python."""
    arguments: Callable[[Models, int], list[str]]
    variables: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, object] = field(default_factory=lambda: GREEDY)
    """What each request says beside its prompt and its number of tokens."""
    names_models: bool = True
    """Whether it says at /v1/models what it serves; else that is the model's folder."""


def _ternlm(dtype: str) -> Callable[[Models, int], list[str]]:
    def arguments(models: Models, port: int) -> list[str]:
        room = ["--kv-tokens", str(TOKENS), "--max-running", str(TEXTS)]
        return ["-m", "ternlm", "serve", str(models.folder), "--dtype", dtype, "--port", str(port), *room]

    return arguments


def _ternlm_llamacpp(models: Models, port: int) -> list[str]:
    room = ["--kv-tokens", str(TOKENS), "--max-running", str(TEXTS)]
    return ["-m", "ternlm", "serve", str(models.gguf["float16"]), "--engine", "llamacpp", "--port", str(port), *room]


def _llamacpp(dtype: str) -> Callable[[Models, int], list[str]]:
    def arguments(models: Models, port: int) -> list[str]:
        model = str(models.gguf[dtype])
        settings = {"model": model, "name": "smollm2", "port": port, "texts": TEXTS, "tokens": TOKENS}
        return [str(Path(__file__).parent / "llamacpp_server.py"), json.dumps(settings)]

    return arguments


def _transformers(dtype: str) -> Callable[[Models, int], list[str]]:
    def arguments(models: Models, port: int) -> list[str]:
        # The command's own entry point, since the environment's scripts may have been moved.
        start = ["-c", "from transformers.cli.transformers import main; main()", "serve", str(models.folder)]
        blocks = ["--cb-block-size", "32", "--cb-num-blocks", str(TOKENS // 32)]
        return [*start, "--continuous-batching", "--device", "cpu", "--dtype", dtype, "--port", str(port), *blocks]

    return arguments


def _vllm(dtype: str, *more: str) -> Callable[[Models, int], list[str]]:
    def arguments(models: Models, port: int) -> list[str]:
        start = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(models.folder), "--dtype", dtype]
        limits = ["--max-model-len", str(LENGTH), "--max-num-seqs", str(TEXTS)]
        return [*start, "--host", "127.0.0.1", "--port", str(port), *limits, *more]

    return arguments


_HF_BODY = {"generation_config": json.dumps({"do_sample": False, "eos_token_id": -1})}
_VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "{cores}"}
"""1 GiB: room for 23,000 tokens in float32. Left alone, it keeps a core for other things, one of two here."""
_VLLM_OMP = {**_VLLM, "LD_PRELOAD": "{environment}/lib/libiomp5.so"}
"""With the OpenMP library that vLLM's documentation asks for."""

SERVERS = {
    "ternlm": Server("tern serve, float32", None, _ternlm("float32")),
    "hf": Server("transformers serve, continuous batching, float32", "serving", _transformers("float32"), body=_HF_BODY,
                 names_models=False),
    "vllm": Server("vLLM, compiled, float32", "vllm", _vllm("float32"), _VLLM),
    "vllm-omp": Server("vLLM, compiled, Intel's OpenMP, float32", "vllm", _vllm("float32"), _VLLM_OMP),
    "vllm-eager": Server("vLLM, eager, float32", "vllm", _vllm("float32", "--enforce-eager"), _VLLM),
    "llamacpp-f32": Server("llama.cpp's server, float32", None, _llamacpp("float32")),
    "llamacpp-f16": Server("llama.cpp's server, float16", None, _llamacpp("float16")),
    "ternlm-llamacpp": Server("tern serve --engine llamacpp, float16", None, _ternlm_llamacpp),
    "ternlm-bf16": Server("tern serve, bfloat16", None, _ternlm("bfloat16")),
    "vllm-bf16": Server("vLLM, compiled, bfloat16", "vllm", _vllm("bfloat16"), _VLLM),
    "hf-bf16": Server("transformers serve, continuous batching, bfloat16", "serving", _transformers("bfloat16"),
                      body=_HF_BODY, names_models=False),
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """Requests as so many clients send them, each its next one when it has the last answer."""

    title: str
    clients: int
    requests: int
    shared_words: int = 0
    """That all prompts begin with."""


LOADS = {
    "1": Load("1 client", 1, 3),
    "8": Load("8 clients", 8, 16),
    "32": Load("32 clients", 32, 48),
    "shared": Load("8 clients, prompts that begin with the same 500 words", 8, 16, shared_words=500),
}
PROMPT_WORDS, OUTPUT_TOKENS = (100, 200), (64, 128)


@dataclass(frozen=True)
class Aim:
    """What a server of ours is to reach against another one, at so many clients and more."""

    ours: str
    peer: str
    ratio: float
    loads: tuple[str, ...]


_BATCHES = ("8", "32", "shared")
AIMS = (
    Aim("ternlm", "hf", 1.5, tuple(LOADS)),
    Aim("ternlm", "llamacpp-f32", 1.0, _BATCHES),
    Aim("ternlm", "vllm", 1.0, _BATCHES),
    Aim("ternlm-llamacpp", "llamacpp-f16", 1.0, tuple(LOADS)),
)
