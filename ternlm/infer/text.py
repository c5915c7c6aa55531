"""Continue texts: prompts encoded, generated from and decoded, all at the end or piece by piece as they come."""

from collections.abc import Callable, Sequence

import torch

from ternlm.config.section import ConfigError
from ternlm.data.tokenizer import Tokenizer
from ternlm.infer.engine import generate
from ternlm.infer.params import SamplingParams
from ternlm.model.decoder import CausalLM

_NO_CHARACTER = "\ufffd"
"""What bytes that make no character, such as the first half of one, are decoded to."""


def continue_texts(
    model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, temperature: float
) -> list[str]:
    """Return the continuation of each prompt, up to the tokenizer's end token, as training shows it."""
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, seed=0, stop_ids=stop_ids(tokenizer)
    )
    # Blocks compiled for training would be compiled again for every length.
    with torch.compiler.set_stance("force_eager"):
        return generate_texts(model, tokenizer, prompts, params)


def generate_texts(model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[str], params: SamplingParams) -> list[str]:
    """Return the continuation of each prompt, without the prompt."""
    return continue_encoded(model, tokenizer, [encode_prompt(tokenizer, prompt) for prompt in prompts], params)


def continue_encoded(
    model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[list[int]], params: SamplingParams
) -> list[str]:
    """Return the continuation of each prompt of ids, as text."""
    continuations = []
    for prompt, tokens in zip(prompts, generate(model, prompts, params), strict=True):
        stream = TextStream(tokenizer, prompt)
        continuations.append(stream.add(tokens) + stream.finish())
    return continuations


def stream_text(
    model: CausalLM, tokenizer: Tokenizer, prompt: str, params: SamplingParams, write: Callable[[str], None]
) -> None:
    """Hand the continuation of a prompt to `write`, piece by piece as it is generated."""
    tokens = encode_prompt(tokenizer, prompt)
    stream = TextStream(tokenizer, tokens)
    generate(model, [tokens], params, on_token=lambda _row, token: write(stream.add([token])))
    write(stream.finish())


class TextStream:
    """Turns a prompt's new tokens into text.

    All tokens are decoded together, since a token's text depends on those before it: a character may be spread over
    several, and some tokenizers drop the space in front of the first. What was told is never taken back, though
    sentencepiece would: one wrong byte makes it give up all bytes around.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer, self._tokens = tokenizer, list(prompt)
        self._told = tokenizer.decode(self._tokens)

    def add(self, tokens: Sequence[int]) -> str:
        """Return what is new by these tokens; nothing while they end within a character."""
        self._tokens.extend(tokens)
        text = self._tokenizer.decode(self._tokens)
        return "" if text.endswith(_NO_CHARACTER) else self._tell(text)

    def finish(self) -> str:
        """Return what was held back."""
        return self._tell(self._tokenizer.decode(self._tokens))

    def _tell(self, text: str) -> str:
        told, self._told = self._told, text
        if text.startswith(told):
            return text[len(told) :]
        return text[next((i for i, (old, new) in enumerate(zip(told, text, strict=False)) if old != new), len(text)) :]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt as the beginning of a document."""
    try:
        prompt.encode()
    except UnicodeEncodeError as trouble:
        raise ConfigError(f"the prompt {prompt!r} isn't valid text ({trouble.reason}); give it as UTF-8") from trouble
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(prompt)


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a text."""
    return frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})
