"""Sentencepiece models in GGUF: a `.model` file's bytes rebuilt from pieces, scores and types."""

import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ternlm.data.sentencepiece import BYTE, CONTROL, UNUSED

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def sentencepiece_model(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], bos: str | None, eos: str | None,
    metadata: Mapping[str, Any],
) -> bytes:  # fmt: skip
    """Return the bytes of a sentencepiece BPE `.model`, for `parse_model`.

    Unused pieces become control pieces, which text can't reach either: InternLM2's files hold some between others.
    """
    content = bytearray()
    for index, (piece, score, kind) in enumerate(zip(pieces, scores, types, strict=True)):
        if kind == UNUSED or (kind == BYTE and not _BYTE_PIECE.fullmatch(piece)):
            kind = CONTROL
            # A character of its own would be found in text whatever its type.
            piece = piece if len(piece) > 1 else f"<unused {index}>"
        content += _message(1, _message(1, piece.encode()) + _float(2, score) + _integer(3, kind))
    trainer = _integer(3, 2) + _integer(35, BYTE in types)
    trainer += b"".join(_message(number, piece.encode()) for number, piece in ((46, bos), (47, eos)) if piece)
    content += _message(2, trainer)
    normalizer = _message(1, b"identity")
    normalizer += _integer(3, metadata.get("tokenizer.ggml.add_space_prefix", True))
    normalizer += _integer(4, metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
    return bytes(content + _message(3, normalizer + _integer(5, True)))


def _varint(value: int) -> bytes:
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*content, value])


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content
