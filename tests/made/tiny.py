"""Small random models, and what full forward passes say of them."""

import torch

from ternlm.config.model import ModelConfig, RopeScaling
from ternlm.model.decoder import build_model
from ternlm.ops.attention import make_segment_attend

SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
)
CONFIGS = {
    "biases": ModelConfig(**SHAPE, attention_bias=True),
    "gqa, q/k norm, tied": ModelConfig(**SHAPE, num_key_value_heads=2, qk_norm=True, tie_word_embeddings=True),
    "dynamic": ModelConfig(**SHAPE, rope_scaling=RopeScaling(kind="dynamic", factor=2.0)),
    "linear": ModelConfig(**SHAPE, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "yarn, gqa": ModelConfig(**SHAPE, num_key_value_heads=1, rope_scaling=RopeScaling(kind="yarn", factor=4.0)),
}
# Heads of 8 go by PyTorch's operators, heads of 16 by functions in C where there is a compiler.
CONFIGS |= {f"{name}, heads of 16": config.model_copy(update={"head_dim": 16}) for name, config in CONFIGS.items()}
CPU = torch.device("cpu")
LONG = ModelConfig(
    **(CONFIGS["biases, heads of 16"].model_dump(exclude_none=True, by_alias=True) | {"max_position_embeddings": 256})
)
HEADS_OF_8 = {"head_dim": 8}
"""By PyTorch's operators."""


def random_model(config, seed=0):
    """A model whose biases and norms are not the usual zeros and ones, and whose attention is not flat."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = build_model(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


@torch.no_grad()
def full_logits(model, tokens, rope_length):
    attend = make_segment_attend([[len(tokens)]], CPU)
    hidden = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], attend, rope_length)
    return model.lm_head(hidden)[0]


def random_prompts(lengths, vocab_size=97, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def run(engine):
    """All events until nothing is left to do."""
    events = []
    while engine.is_busy:
        events += engine.step()
    return events


def greedy_alone(model, prompt, params, rope_length=0):
    """Greedy text by full forward passes."""
    tokens = list(prompt)
    for _ in range(params.max_new_tokens):
        token = int(full_logits(model, tokens, rope_length)[-1].argmax())
        if token in params.stop_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
