"""Have LMDeploy read exported chat models on a CPU, and compare what it makes of them. Not a part of the test run.

    python3 -m venv LMDEPLOY
    python -c "import site; print(site.getsitepackages()[0])" > LMDEPLOY/lib/python3.11/site-packages/ternlm.pth
    LMDEPLOY/bin/python -m pip install --no-deps lmdeploy mmengine-lite addict yapf platformdirs termcolor fire \\
        shortuuid openai-harmony psutil pybase64 pyzmq
    TERNLM_SHARED=../shared python tests/interop/read_with_lmdeploy.py LMDEPLOY/bin/python

The second line lends it the packages of TernLM's environment with the extra `test`: torch for the CPU, transformers and
what else LMDeploy imports. Its engines need a GPU; its parts in Python don't: which of its models an architecture is,
whether TurboMind takes it, settings, chat template, stop words, tokenizer, and the PyTorch engine's rotary tables. Exit
code 0 where all are as here.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "made"))

from in_memory import Ones

from ternlm.config.model import ModelConfig, RopeScaling
from ternlm.convert.export_hf import export_hf
from ternlm.convert.huggingface import open_hf
from ternlm.convert.weights import OpenModel
from ternlm.data.chat import PROTOCOLS, encode_chat, render
from ternlm.data.tokenizer import load_tokenizer
from ternlm.model.rope import rope_tables

TOKENIZERS = {"internlm": "internlm_v7_sft.model", "internlm2": "internlm2_tokenizer.model"}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 8.0, "original_max_position_embeddings": 32},
}
MESSAGES = [
    {"role": "user", "content": "What is 2+2? 二加二？"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "def f(x):\n    return x"},
]
LENGTH = 300  # tokens of the rotary tables, past the trained 256

THEIRS = """
import json, sys
import torch
from lmdeploy.archs import get_model_arch
from lmdeploy.model import get_chat_template
from lmdeploy.pytorch.backends.default.rotary_embedding import _build_rotary_embedding
from lmdeploy.pytorch.backends.rotary_embedding import RotaryEmbeddingBuildSpec
from lmdeploy.pytorch.config import ModelConfig
from lmdeploy.pytorch.models.module_map import MODULE_MAP
from lmdeploy.pytorch.nn.rotary_embedding import build_rotary_params, get_rope_theta
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.turbomind.supported_models import is_supported

folder, messages, length = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
arch, config = get_model_arch(folder)
settings = ModelConfig.from_pretrained(folder, dtype="float16", device_type="cuda")
template = get_chat_template(folder)
prompt = template.messages2prompt(messages)
tokenizer = Tokenizer(folder)
spec = {"dim": config.head_dim, "max_position_embeddings": config.max_position_embeddings}
spec |= {"base": get_rope_theta(config), **build_rotary_params(config)}
cos, sin = _build_rotary_embedding(RotaryEmbeddingBuildSpec(**spec))(torch.zeros(1), torch.arange(length)[None])
names = ("hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
print("RESULT" + json.dumps({
    "module": MODULE_MAP[arch].rpartition(".")[2], "turbomind": is_supported(folder),
    "settings": [getattr(settings, name) for name in names], "ends": settings.eos_token_id,
    "prompt": prompt, "stop": template.stop_words, "ids": tokenizer.encode(prompt, add_bos=False),
    "vocab": tokenizer.vocab_size, "cos": cos[0].tolist(), "sin": sin[0].tolist(),
}))
"""


def main() -> int:
    """Compare, print what differs of each model, and return the exit code."""
    shared = Path(os.environ.get("TERNLM_SHARED", "../shared")) / "data"
    failed = 0
    for protocol, tokenizer in TOKENIZERS.items():
        for kind in SCALINGS:
            with tempfile.TemporaryDirectory(prefix="ternlm-lmdeploy-") as name:
                folder = Path(name) / "model"
                export_hf(tiny(shared / tokenizer, protocol, kind), folder, chat=PROTOCOLS[protocol])
                wrong = differences(open_hf(folder), protocol, read_by_lmdeploy(sys.argv[1], folder))
            failed += bool(wrong)
            print(f"{protocol}, {kind}: {'; '.join(wrong) or 'all the same'}")
    return 1 if failed else 0


def tiny(tokenizer: Path, protocol: str, kind: str) -> OpenModel:
    """Return a small model with a real tokenizer; InternLM's has biases, InternLM2's norms of q and k."""
    fitted = PROTOCOLS[protocol].fit(load_tokenizer(tokenizer))
    config = ModelConfig(
        vocab_size=-(-fitted.vocab_size // 64) * 64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        attention_bias=protocol == "internlm",
        qk_norm=protocol == "internlm2",
        max_position_embeddings=256,
        rope_scaling=RopeScaling.model_validate({"kind": kind, **SCALINGS[kind]}),
    )
    return OpenModel(tokenizer, config, Ones(config), fitted)


def read_by_lmdeploy(python: str, folder: Path) -> dict[str, Any]:
    """Return what LMDeploy, in its own environment, makes of a folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [python, "-c", THEIRS, str(folder), json.dumps(MESSAGES), str(LENGTH)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"LMDeploy failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.rpartition("RESULT")[2])


def differences(opened: OpenModel, protocol: str, found: dict[str, Any]) -> list[str]:
    """Name what LMDeploy makes of a model otherwise than we do."""
    config, tokenizer, chat = opened.config, opened.tokenizer, PROTOCOLS[protocol]
    assert tokenizer is not None
    cos, sin = rope_tables(config, torch.arange(LENGTH)[None], LENGTH, torch.float32)
    tables = [torch.tensor(found.pop(name)) - ours[0, :, 0] for name, ours in (("cos", cos), ("sin", sin))]
    wanted = {
        "module": "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM",
        "turbomind": True,
        "settings": [
            config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.kv_heads,
            config.head_size, config.vocab_size,
        ],
        "ends": [tokenizer.id_of(token) for token in chat.stop],
        "prompt": render(chat.template, MESSAGES),
        "stop": [chat.stop[0]],
        "ids": encode_chat(tokenizer, chat.template, MESSAGES),
        "vocab": tokenizer.vocab_size,
    }  # fmt: skip
    wrong = [f"{name}: {found[name]!r}, not {value!r}" for name, value in wanted.items() if found[name] != value]
    largest = max(float(table.abs().max()) for table in tables)
    return wrong + ([f"rotary tables differ by {largest:.1e}"] if largest > 1e-5 else [])


if __name__ == "__main__":
    sys.exit(main())
