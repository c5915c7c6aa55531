import pytest
import torch

from ternlm.config.model import ModelConfig
from ternlm.model.rope import rope_tables, rotate


@pytest.mark.parametrize(
    "scaling",
    [
        {"kind": "default"},
        {"kind": "linear", "factor": 4.0},
        {"kind": "dynamic", "factor": 2.0},
        {"kind": "yarn", "factor": 4.0},
        {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"kind": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5},
    ],
)
@pytest.mark.parametrize("length", [32, 64, 200])
def test_angles_equal_transformers(scaling, length):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours = ModelConfig(preset="tiny", max_position_embeddings=64, rope_scaling=scaling)
    theirs = {"rope_theta": 10000.0, "rope_type": scaling["kind"]}
    theirs |= {key: value for key, value in scaling.items() if key != "kind"}
    if scaling["kind"] in ("yarn", "llama3"):
        theirs["original_max_position_embeddings"] = 64
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_parameters=theirs
    )
    positions = torch.arange(length)[None]
    cos, sin = rope_tables(ours, positions, length, torch.float32)
    their_cos, their_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    torch.testing.assert_close(cos[:, :, 0], their_cos, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin[:, :, 0], their_sin, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_distance_alone():
    config = ModelConfig(preset="tiny")
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def score(i, j):
        tables = [rope_tables(config, torch.tensor([[p]]), 0, torch.float32) for p in (i, j)]
        return (rotate(q, *tables[0]) * rotate(k, *tables[1])).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), rtol=1e-4, atol=1e-4)


def test_each_token_is_rotated_as_in_a_batch_of_its_own_document():
    config = ModelConfig(preset="tiny", max_position_embeddings=64, rope_scaling={"kind": "dynamic", "factor": 2.0})
    lengths = (40, 100, 64)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    each = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))[None]
    packed = rope_tables(config, positions, each, torch.float32)
    alone = [rope_tables(config, torch.arange(length)[None], length, torch.float32) for length in lengths]
    for whole, parts in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts, 1), rtol=1e-6, atol=1e-6)
