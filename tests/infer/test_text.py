import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers

from ternlm.config.model import ModelConfig
from ternlm.data.tokenizer import Tokenizer, train_bpe
from ternlm.infer.params import SamplingParams
from ternlm.infer.text import TextStream, continue_texts, encode_prompt, generate_texts, stream_text
from ternlm.model.decoder import build_model

TEXT = "The tern flies far. 燕鸥飞得很远。 It flies 🐦 farther than any other bird, é and all."


def like_sentencepiece():
    """A tokenizer that puts a space before the text, and drops it again from what it decodes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyzT.,"]
    backend = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend.to_str())


TOKENIZERS = {"byte-level": train_bpe(iter([TEXT]), 270), "like sentencepiece": like_sentencepiece()}


def small_model(tokenizer):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset="tiny", vocab_size=tokenizer.vocab_size))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("cut", range(0, len(TEXT), 5))
def test_a_streamed_text_has_whole_characters_and_keeps_its_spaces(tokenizer, cut):
    prompt = encode_prompt(tokenizer, TEXT[:cut])
    whole = encode_prompt(tokenizer, TEXT)
    if whole[: len(prompt)] != prompt:
        pytest.skip("the cut splits a token")
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add([token]) for token in whole[len(prompt) :]]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == TEXT[cut:]


def test_half_a_character_at_the_end_is_told_last():
    tokenizer = like_sentencepiece()
    stream = TextStream(tokenizer, encode_prompt(tokenizer, "a"))
    tokens = tokenizer.encode("燕")[-3:]
    assert [stream.add([token]) for token in tokens] == ["", "", "燕"]
    assert stream.add(tokens[:1]) == ""
    assert stream.finish() != ""


def test_the_streamed_pieces_are_the_generated_text():
    tokenizer = TOKENIZERS["byte-level"]
    model, params, pieces = small_model(tokenizer), SamplingParams(max_new_tokens=40, seed=3), []
    stream_text(model, tokenizer, "The tern", params, pieces.append)
    (text,) = generate_texts(model, tokenizer, ["The tern"], params)
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 5


def test_the_space_after_the_prompt_is_kept():
    tokenizer = like_sentencepiece()
    stream = TextStream(tokenizer, encode_prompt(tokenizer, "The"))
    assert stream.add([tokenizer.id_of("\u2581"), tokenizer.id_of("t")]) == " t"


def test_prompts_are_continued_in_their_order():
    tokenizer = TOKENIZERS["byte-level"]
    model = small_model(tokenizer)
    texts = continue_texts(model, tokenizer, ["The ", "It "], 8, 0.0)
    assert texts == [continue_texts(model, tokenizer, [prompt], 8, 0.0)[0] for prompt in ("The ", "It ")]
