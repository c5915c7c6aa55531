import pytest
import torch

from ternlm.config.model import PRESETS, ModelConfig
from ternlm.model.decoder import build_empty_model, build_model
from ternlm.ops.attention import make_segment_attend

CPU = torch.device("cpu")


def random_model(config, std=0.1):
    """Weights and biases that are all non-zero, so that nothing cancels."""
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std)
    return model


def logits(model, tokens, lengths=None):
    B, T = tokens.shape
    lengths = lengths or [[T]] * B
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return model.lm_head(model(tokens, positions, make_segment_attend(lengths, CPU)))


SHAPES = {
    "internlm": dict(attention_bias=True),
    "grouped": dict(num_key_value_heads=2),
    "grouped and biased": dict(num_key_value_heads=2, attention_bias=True),
    "tied": dict(tie_word_embeddings=True, attention_bias=True),
    "own head size": dict(head_dim=32, attention_bias=True),
    "linear rope": dict(rope_scaling={"kind": "linear", "factor": 4.0}),
    "dynamic rope": dict(rope_scaling={"kind": "dynamic", "factor": 2.0}),
    "yarn rope": dict(rope_scaling={"kind": "yarn", "factor": 4.0}),
}


def hf_llama(config, model):
    transformers = pytest.importorskip("transformers")
    scaling = config.rope_scaling
    rope = {"rope_theta": config.rope_theta, "rope_type": scaling.kind}
    if scaling.kind != "default":
        rope["factor"] = scaling.factor
    if scaling.kind == "yarn":
        rope["original_max_position_embeddings"] = config.rope_original_length
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, head_dim=config.head_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.kv_heads, intermediate_size=config.intermediate_size,
            attention_bias=config.attention_bias, rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings, rope_parameters=rope,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )  # fmt: skip
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_llama(shape):
    given = dict(SHAPES[shape])
    config = ModelConfig(preset="tiny", max_position_embeddings=64, **given)
    model = random_model(config)
    tokens = torch.randint(config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = logits(model, tokens), hf_llama(config, model)(tokens).logits
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5


def test_qk_norm_logits_equal_transformers_qwen3():
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(preset="tiny-gqa", qk_norm=True, rms_norm_eps=1e-6)
    model = random_model(config)
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=512, hidden_size=64, head_dim=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=256, rms_norm_eps=1e-6, max_position_embeddings=256,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}, tie_word_embeddings=False,
        )
    )  # fmt: skip
    theirs.load_state_dict(model.state_dict(), strict=True)
    tokens = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = logits(model, tokens), theirs.eval()(tokens).logits
    assert (ours - expected).abs().max() / expected.abs().max() < 1e-5


def test_packed_documents_equal_the_documents_alone():
    model = random_model(ModelConfig(preset="tiny-gqa", attention_bias=True))
    tokens = torch.randint(512, (1, 30), generator=torch.Generator().manual_seed(1))
    packed = logits(model, tokens, [[7, 1, 22]])
    alone = torch.cat([logits(model, part) for part in tokens.split([7, 1, 22], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_parameter_count_of_the_settings_is_the_models(preset):
    config = ModelConfig(preset=preset)
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_params


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_empty_model_takes_the_weights_of_another_and_ties_the_same(shape):
    config = ModelConfig(**{"preset": "tiny", **shape})
    model, empty = random_model(config), build_empty_model(config, CPU)
    tied = empty.lm_head.weight.data_ptr() == empty.model.embed_tokens.weight.data_ptr()
    assert tied == config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in empty.named_parameters():
            parameter.copy_(dict(model.named_parameters())[name])
    tokens = torch.arange(12)[None]
    assert torch.equal(logits(model, tokens), logits(empty, tokens))


def test_internlm_presets_have_the_published_sizes():
    assert ModelConfig(preset="internlm-7b").num_params == 7_321_948_160
    assert ModelConfig(preset="internlm-20b").num_params == 20_089_943_040
