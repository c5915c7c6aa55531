"""Text that keeps to a grammar, by the library llguidance: a `Constraint` for each text of a compiled grammar.

Grammars are llguidance's Lark, in which `%json {...}` stands for what keeps to a JSON schema and `<name>` for a special
token. Without the library nothing here works, and nothing else needs it.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternlm.config.section import ConfigError
from ternlm.data.tokenizer import Tokenizer
from ternlm.infer.request import GivenUp

INSTALL = "pip install llguidance"


class Grammars:
    """Compiles grammars for a model's tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> None:
        """vocab_size: the model's, at least the tokenizer's. Raises ConfigError where llguidance is absent."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise ConfigError(f"text can't be held to a grammar without the library llguidance; {INSTALL}") from error
        self._vocab_size, self._device = vocab_size, device
        eos = next((i for i in (tokenizer.eos_id, *sorted(tokenizer.special_ids)) if i is not None), None)
        if eos is None:
            raise ConfigError("text can't be held to a grammar by a tokenizer without special tokens: none ends it")
        self._tokens = LLTokenizer(TokenizerWrapper(_Pieces(tokenizer, eos)))

    def compile(self, grammar: str, stop_ids: Collection[int]) -> "GrammarConstraint":
        """Return the constraint of one text, which ends by one of `stop_ids` once the grammar is fulfilled.

        Raises ConfigError for a grammar that can't be used, and for no `stop_ids`.
        """
        from llguidance import LLMatcher

        if not stop_ids:
            raise ConfigError("a text that keeps to a grammar must be able to end; give it a token that ends it")
        try:
            matcher = LLMatcher(self._tokens, grammar, log_level=0)
        except ValueError as error:
            raise ConfigError(f"the grammar can't be used: {_first_lines(str(error))}") from error
        if matcher.is_error():
            raise ConfigError(f"the grammar can't be used: {_first_lines(matcher.get_error())}")
        return GrammarConstraint(matcher, self._tokens.vocab_size, self._vocab_size, stop_ids, self._device)


class GrammarConstraint:
    """As `Constraint`: which tokens the grammar lets come next."""

    def __init__(
        self, matcher: Any, num_tokens: int, vocab_size: int, stop_ids: Collection[int], device: torch.device
    ) -> None:
        self._matcher, self._num_tokens, self._vocab_size, self._device = matcher, num_tokens, vocab_size, device
        self._stop = np.array(sorted(stop_ids))
        self._mask = np.zeros(-(-num_tokens // 32), dtype=np.int32)

    def allowed(self) -> Tensor | None:
        """As `Constraint`."""
        allowed_V = np.zeros(self._vocab_size, dtype=bool)
        matcher = self._matcher
        if not (matcher.is_error() or matcher.is_stopped()):
            matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._num_tokens]
            allowed_V[: len(bits)] = bits
            allowed_V[self._stop] = matcher.is_accepting()
        if matcher.is_error():
            raise GivenUp(f"a grammar was given up: {_first_lines(matcher.get_error())}")
        if not allowed_V.any():
            if not matcher.is_stopped():
                raise GivenUp("a grammar lets nothing come next")
            allowed_V[self._stop] = True
        return torch.from_numpy(allowed_V).to(self._device)

    def accept(self, token: int) -> None:
        """As `Constraint`."""
        if not self._matcher.is_error():
            self._matcher.consume_token(token)


class _Pieces:
    """A tokenizer as llguidance takes it."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        special = tokenizer.special_ids
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id
        self.tokens = [
            tokenizer.token_of(index).encode() if index in special else piece
            for index, piece in enumerate(tokenizer.pieces)
        ]
        self.special_token_ids = sorted(special)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("texts alone, not bytes")
        return self._encode(text)


def _first_lines(message: str) -> str:
    """Return what an error says, without the text that it came upon: that is nobody's but the user's."""
    return " ".join(message.partition("<state>")[0].split())[:300]
