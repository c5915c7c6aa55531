"""Continue texts: prompts encoded, generated from and decoded, all at the end or piece by piece as they come."""

from collections.abc import Callable, Collection, Sequence

import torch

from ternlm.config.section import ConfigError
from ternlm.data.tokenizer import Tokenizer
from ternlm.infer.engine import generate
from ternlm.infer.params import SamplingParams
from ternlm.model.decoder import CausalLM

_NO_CHARACTER = "\ufffd"
"""What bytes that make no character, such as the first half of one, are decoded to."""
_HELD = 12
"""Tokens that wait for the end of a character before it is asked whether there is one."""

_TAIL = 32
"""Tokens of a prompt that may matter for what follows it."""


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
    """Turns a prompt's new tokens into text, each decoded a few times at most.

    A token's text depends on those before it: a character may be spread over several, and some tokenizers drop the
    space in front of the first. So tokens are decoded behind one that has a text, and those that end within a character
    wait for more. What was told is never taken back, though sentencepiece would: one wrong byte makes it give up all
    bytes around.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], shown: Collection[int] = ()) -> None:
        """shown: special tokens that are told by their names, as what marks calls of tools; others have no text."""
        self._tokenizer = tokenizer
        self._shown = {index: tokenizer.token_of(index) for index in shown}
        self._hidden = tokenizer.special_ids
        tokens = self._texts(prompt)[-_TAIL:]
        text = tokenizer.decode(tokens)
        self._anchor: list[int] = []
        """Tokens of a text to which nothing behind them changes anything, once there is text before."""
        self._anchor_length = 0
        if text:
            self._set_anchor()
        # A prompt may end within a character, which the first tokens complete.
        begun = next((n for n in range(5) if not _is_open(tokenizer.decode(tokens[: len(tokens) - n]))), 0)
        self._tokens = tokens[len(tokens) - begun :] if text else tokens
        self._told = self._decode(self._tokens)

    def add(self, tokens: Sequence[int]) -> str:
        """Return what is new by these tokens; nothing while they end within a character."""
        told, first = [], 0
        for place, token in enumerate(tokens):
            if token in self._shown:
                told += [self._advance(tokens[first:place]), self.finish(), self._shown[token]]
                first = place + 1
        return "".join([*told, self._advance(tokens[first:])])

    def finish(self) -> str:
        """Return what was held back."""
        return self._tell(self._decode(self._tokens), len(self._tokens))

    def _advance(self, tokens: Sequence[int]) -> str:
        self._tokens += self._texts(tokens)
        text = self._decode(self._tokens)
        if not _is_open(text):
            return self._tell(text, len(self._tokens))
        if len(self._tokens) < _HELD:
            return ""
        return self._tell_some(text)

    def _tell_some(self, text: str) -> str:
        """Tell of many tokens that all end within a character: of bytes that make none."""
        # A character has four bytes at most: those before are settled, if they can be cut off.
        for place in range(len(self._tokens) - 4, 0, -1):
            first, rest = self._decode(self._tokens[:place]), self._decode(self._tokens[place:])
            if first + rest == text or len(self._tokens) > 4 * _HELD:
                return self._tell(first, place)
        return ""

    def _tell(self, text: str, place: int) -> str:
        told, self._told = self._told, ""
        if text or self._anchor:
            self._tokens = self._tokens[place:]
        if text and not self._anchor:
            self._set_anchor()
        if text.startswith(told):
            return text[len(told) :]
        return text[next((i for i, (old, new) in enumerate(zip(told, text, strict=False)) if old != new), len(text)) :]

    def _texts(self, tokens: Sequence[int]) -> list[int]:
        """Leave out what has no text: special tokens, and ids that pad a model's vocabulary."""
        size = self._tokenizer.vocab_size
        return [token for token in tokens if token not in self._hidden and 0 <= token < size]

    def _set_anchor(self) -> None:
        self._anchor = self._tokenizer.encode("a")
        self._anchor_length = len(self._tokenizer.decode(self._anchor))

    def _decode(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        return self._tokenizer.decode([*self._anchor, *tokens])[self._anchor_length :]


def _is_open(text: str) -> bool:
    """Whether a text may end within a character."""
    return text.endswith(_NO_CHARACTER)


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
