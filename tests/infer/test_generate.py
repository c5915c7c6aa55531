import pytest
import torch
from in_memory import greedy

from ternlm.config.model import ModelConfig, RopeScaling
from ternlm.config.section import ConfigError
from ternlm.infer.cache import KVCache
from ternlm.infer.generate import generate
from ternlm.infer.sampling import SamplingParams
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
GREEDY = greedy(12)
CPU = torch.device("cpu")


def random_model(config, seed=0):
    """A model whose biases and norms are not the usual zeros and ones, and whose attention is not flat."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = build_model(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def full_logits(model, tokens, rope_length):
    attend = make_segment_attend([[len(tokens)]], CPU)
    hidden = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], attend, rope_length)
    return model.lm_head(hidden)[0]


def random_prompts(lengths, vocab_size=97, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(config):
    model, rope_length = random_model(config), 48
    sequences = random_prompts([9, 16, 12])
    # Unequal prefills, then unequal chunks with rows left out, then single tokens.
    plan = [(3, 9, 1), (2, 0, 4), (1, 1, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 1, 1)]
    cache, done = KVCache(config, 3, 20, torch.float32, CPU), [0, 0, 0]
    for counts in plan:
        tokens = torch.full((3, max(counts)), 96)
        for row, count in enumerate(counts):
            tokens[row, :count] = torch.tensor(sequences[row][done[row] : done[row] + count])
        positions = cache.place(counts)
        logits = model.lm_head(model(tokens, positions, cache.attend, rope_length))
        for row, count in enumerate(counts):
            expected = full_logits(model, sequences[row][: done[row] + count], rope_length)
            torch.testing.assert_close(logits[row, :count], expected[done[row] :], rtol=1e-5, atol=1e-5)
            done[row] += count
    assert done == cache.lengths == [9, 14, 9]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_greedy_text_is_that_of_full_forwards(config):
    model, prompts = random_model(config), random_prompts([5, 11, 2, 19])
    texts = generate(model, prompts, GREEDY)
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(full_logits(model, tokens, rope_length=len(prompt) + 12)[-1].argmax()))
        assert text == tokens[len(prompt) :]


@torch.no_grad()
def test_dynamic_scaling_past_the_trained_length_is_fixed_for_each_prompt():
    config = CONFIGS["dynamic"]
    model, prompts = random_model(config), random_prompts([30, 4, 45])
    texts = generate(model, prompts, GREEDY)
    for prompt, text in zip(prompts, texts, strict=True):
        logits = full_logits(model, [*prompt, *text], rope_length=len(prompt) + 12)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == text
    short = full_logits(model, [*prompts[2], *texts[2]], rope_length=32)
    long = full_logits(model, [*prompts[2], *texts[2]], rope_length=57)
    assert (short - long).abs().max() > 0.01  # the length does matter here


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_greedy_text_equals_that_of_transformers(kv_heads):
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(**SHAPE, attention_bias=True, num_key_value_heads=kv_heads)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SHAPE,
            num_key_value_heads=kv_heads,
            attention_bias=True,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    ours = random_model(config)
    theirs.load_state_dict(ours.state_dict())
    prompts = random_prompts([5, 14, 9])
    texts = generate(ours, prompts, GREEDY)
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = torch.tensor([prompt])
        output = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, repetition_penalty=1.0
        )
        assert output[0, len(prompt) :].tolist() == text


@torch.no_grad()
def test_repetition_penalty_covers_the_prompt_and_the_text():
    model, (prompt,) = random_model(CONFIGS["biases"]), random_prompts([6])
    params = greedy(12, repetition_penalty=1e9)
    (text,) = generate(model, [prompt], params)
    assert len({*prompt, *text}) == len(set(prompt)) + 12  # nothing comes twice while other logits are positive
    tokens = list(prompt)
    for _ in range(12):
        logits = full_logits(model, tokens, 0)[-1]
        logits[tokens] = torch.where(logits[tokens] > 0, logits[tokens] / 1e9, logits[tokens] * 1e9)
        tokens.append(int(logits.argmax()))
    assert text == tokens[len(prompt) :]


def test_a_stop_token_ends_its_row_alone_and_is_not_part_of_the_text():
    model, prompts = random_model(CONFIGS["biases"]), random_prompts([5, 11, 2])
    whole = generate(model, prompts, GREEDY)
    stop = whole[1][3]
    params = greedy(12, [stop])
    for before, after in zip(whole, generate(model, prompts, params), strict=True):
        assert after == (before[: before.index(stop)] if stop in before else before)


def test_tokens_are_told_as_they_come():
    model, prompts = random_model(CONFIGS["biases"]), random_prompts([5, 3])
    told = []
    texts = generate(model, prompts, GREEDY, on_token=lambda row, token: told.append((row, token)))
    assert told == [pair for i in range(12) for pair in ((0, texts[0][i]), (1, texts[1][i]))]


def test_sampled_text_is_the_same_alone_in_any_batch_and_again():
    model, prompts = random_model(CONFIGS["biases"]), random_prompts([5, 11, 2, 7])
    params = SamplingParams(max_new_tokens=16, temperature=1.5, top_k=60, top_p=0.95, seed=3)
    texts = generate(model, prompts, params)
    assert generate(model, prompts, params) == texts
    assert [generate(model, [prompt], params)[0] for prompt in prompts] == texts
    assert generate(model, prompts[::-1], params) == texts[::-1]
    other = SamplingParams(max_new_tokens=16, temperature=1.5, top_k=60, top_p=0.95, seed=4)
    assert generate(model, prompts, other) != texts


def test_a_prompt_given_twice_is_continued_in_two_ways():
    model, (prompt,) = random_model(CONFIGS["biases"]), random_prompts([5])
    first, second = generate(model, [prompt, prompt], SamplingParams(max_new_tokens=16, seed=3))
    assert first != second


def test_under_autocast_the_cache_has_its_dtype():
    model, prompts = random_model(CONFIGS["gqa, q/k norm, tied"]), random_prompts([5, 3])
    with torch.autocast("cpu", torch.bfloat16):
        texts = generate(model, prompts, greedy(2))
    assert [len(text) for text in texts] == [2, 2]


def test_no_gradient_is_kept():
    model, prompts = random_model(CONFIGS["biases"]), random_prompts([5])
    generate(model, prompts, SamplingParams(max_new_tokens=2))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1, 97]], "token id 97"),
        ([[-1]], "token id -1"),
        ([[1] * 21], "21 tokens and max_new_tokens = 12 exceed max_position_embeddings = 32"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompts, error):
    with pytest.raises(ConfigError, match=error):
        generate(random_model(CONFIGS["biases"]), prompts, GREEDY)


def test_no_prompts_give_no_texts():
    assert generate(random_model(CONFIGS["biases"]), [], GREEDY) == []


def test_a_cache_refuses_more_than_it_holds():
    cache = KVCache(CONFIGS["biases"], 2, 8, torch.float32, CPU)
    cache.place([5, 3])
    with pytest.raises(ValueError, match="don't fit"):
        cache.place([1, 4])
