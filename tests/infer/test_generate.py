import pytest
import torch
from in_memory import greedy
from tiny import CONFIGS, CPU, SHAPE, full_logits, random_model, random_prompts

from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError
from ternlm.infer.engine import generate
from ternlm.infer.key_values import Piece
from ternlm.infer.native import make_cache
from ternlm.infer.params import SamplingParams

GREEDY = greedy(12)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(config):
    model, rope_length = random_model(config), 48
    sequences = random_prompts([9, 46, 40])
    # Unequal prefills, then unequal chunks with sequences left out, then single tokens.
    plan = [(3, 19, 1), (2, 0, 34), (1, 17, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 1, 1)]
    cache, done = make_cache(config, 9, torch.float32, CPU), [0, 0, 0]
    blocks = [[8], [1, 3, 5], [7, 0, 4]]
    for counts in plan:
        order = [row for row in (1, 0, 2) if counts[row]]
        positions = cache.place([Piece(blocks[row], done[row], counts[row]) for row in order])
        tokens = [sequences[row][done[row] : done[row] + counts[row]] for row in order]
        new = torch.tensor([[token for own in tokens for token in own]])
        logits = model.lm_head(model(new, positions, cache.attend, rope_length))[0]
        for row, own in zip(order, logits.split([counts[row] for row in order]), strict=True):
            expected = full_logits(model, sequences[row][: done[row] + counts[row]], rope_length)
            torch.testing.assert_close(own, expected[done[row] :], rtol=1e-5, atol=1e-5)
            done[row] += counts[row]
    assert done == [9, 40, 39]


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
