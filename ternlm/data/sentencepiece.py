"""Reads sentencepiece BPE `.model` files and turns them into `tokenizers` BPEs that give the same ids.

Parses the protobuf wire format itself, so the sentencepiece package isn't needed. Field numbers are those of
sentencepiece_model.proto. Used by tokenizer.py alone; knows nothing of files or folders.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from ternlm.data.errors import DataError

SPACE = "\u2581"  # sentencepiece's visible stand-in for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass
class SentencePieceModel:
    """What the ids depend on: the pieces in the order of their ids, and how text becomes characters."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = 1
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    def of_type(self, kind: int) -> list[str]:
        """List the pieces of one type, by id."""
        return [piece for piece, its in zip(self.pieces, self.types, strict=True) if its == kind]


def parse_model(content: bytes, name: str) -> SentencePieceModel:
    """Parse a `.model` file's bytes; `name` is for messages. Raises DataError where it isn't one."""
    model = SentencePieceModel()
    try:
        for number, value in _fields(content):
            if number == 1:
                _add_piece(model, value)
            elif number == 2:
                _read_trainer(model, value)
            elif number == 3:
                _read_normalizer(model, value)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError, TypeError) as error:
        raise DataError(
            f"{name}: not a sentencepiece model ({error}); give a .model file of its, or a tokenizer.json"
        ) from error
    if not model.pieces:
        raise DataError(f"{name}: a sentencepiece model without pieces; is the file whole?")
    _refuse_unsupported(model, name)
    return model


def build_bpe(model: SentencePieceModel) -> Tokenizer:
    """Build the `tokenizers` BPE whose ids equal sentencepiece's; control pieces become special tokens."""
    vocabulary = {_token(model, index): index for index in range(len(model.pieces))}
    unknown = model.of_type(UNKNOWN)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(model),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    steps = _normalizers(model)
    if steps:
        backend.normalizer = normalizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = _decoder(model)
    specials = unknown + model.of_type(CONTROL)
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in specials])
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in model.of_type(USER_DEFINED)])
    if model.bos_piece in model.of_type(CONTROL):
        bos_id = model.pieces.index(model.bos_piece)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{model.bos_piece} $A", special_tokens=[(model.bos_piece, bos_id)]
        )
    return backend


def _fields(buffer: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield (field number, value) of one protobuf message: varints, 32-bit floats, and bytes."""
    position, end = 0, len(buffer)
    while position < end:
        key, position = _varint(buffer, position)
        number, wire = key >> 3, key & 7
        value: int | float | bytes
        if wire == 0:
            value, position = _varint(buffer, position)
        elif wire == 1:
            value, position = buffer[position : position + 8], position + 8
        elif wire == 2:
            length, position = _varint(buffer, position)
            value, position = buffer[position : position + length], position + length
        elif wire == 5:
            (value,) = struct.unpack_from("<f", buffer, position)
            position += 4
        else:
            raise ValueError(f"protobuf wire type {wire} at byte {position}")
        if position > end:
            raise ValueError("the file ends inside a field")
        yield number, value


def _varint(buffer: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _add_piece(model: SentencePieceModel, content: int | float | bytes) -> None:
    piece, score, kind = "", 0.0, NORMAL
    for number, value in _fields(_bytes(content)):
        if number == 1:
            piece = _bytes(value).decode()
        elif number == 2:
            score = float(value)
        elif number == 3:
            kind = int(value)
    model.pieces.append(piece)
    model.scores.append(score)
    model.types.append(kind)


def _read_trainer(model: SentencePieceModel, content: int | float | bytes) -> None:
    for number, value in _fields(_bytes(content)):
        if number == 3:
            model.model_type = int(value)
        elif number == 24:
            model.whitespace_as_suffix = bool(value)
        elif number == 35:
            model.byte_fallback = bool(value)
        elif number == 46:
            model.bos_piece = _bytes(value).decode()
        elif number == 47:
            model.eos_piece = _bytes(value).decode()


def _read_normalizer(model: SentencePieceModel, content: int | float | bytes) -> None:
    for number, value in _fields(_bytes(content)):
        if number == 2:
            model.charsmap = _bytes(value)
        elif number == 3:
            model.add_dummy_prefix = bool(value)
        elif number == 4:
            model.remove_extra_whitespaces = bool(value)
        elif number == 5:
            model.escape_whitespaces = bool(value)


def _bytes(value: int | float | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a text or a message belongs")
    return value


def _refuse_unsupported(model: SentencePieceModel, name: str) -> None:
    """Refuse what `tokenizers` can't reproduce id for id, rather than come close."""
    kind = _MODEL_TYPES.get(model.model_type, str(model.model_type))
    problems = {
        f"its algorithm is {kind}": kind != "bpe",
        "it changes characters before it splits them (a normaliser such as nmt_nfkc)": bool(model.charsmap),
        "it marks spaces at the end of words": model.whitespace_as_suffix,
        "it leaves spaces as they are": not model.escape_whitespaces,
        "it has pieces marked unused": UNUSED in model.types,
        "it adds or removes spaces and has user-defined pieces": USER_DEFINED in model.types
        and (model.add_dummy_prefix or model.remove_extra_whitespaces),
        "it has user-defined pieces that hold a space": any(SPACE in p for p in model.of_type(USER_DEFINED)),
    }
    for problem, there in problems.items():
        if there:
            raise DataError(
                f"{name}: {problem}, so its ids can't be reproduced exactly; TernLM reads sentencepiece BPE "
                "models with an identity normaliser. If the model comes with a tokenizer.json, use that"
            )


def _token(model: SentencePieceModel, index: int) -> str:
    """Name a piece in the new vocabulary; NUL goes by its byte, so its piece is put out of reach of text."""
    piece = model.pieces[index]
    return f"<unused {index}>" if piece == "\0" and model.byte_fallback else piece


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """List every way to join two pieces into one, the best score first.

    sentencepiece looks the joined text up and, at equal scores, joins the leftmost first; a list of merges
    has an order instead. So among equal scores a pair comes before those that would compete on its right.
    """
    scores = {
        piece: score
        for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True)
        if kind == NORMAL
    }
    by_score: dict[float, list[tuple[str, str]]] = {}
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                by_score.setdefault(score, []).append((left, right))
    ordered: list[tuple[str, str]] = []
    for score in sorted(by_score, reverse=True):
        pairs = by_score[score]
        ordered += pairs if len(pairs) == 1 else _leftmost_first(pairs)
    return ordered


def _leftmost_first(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Order pairs (a, b) before pairs (b, c); where they go round in a circle, in the order given."""
    starting_with: dict[str, list[tuple[str, str]]] = {}
    for pair in pairs:
        starting_with.setdefault(pair[0], []).append(pair)
    visited: set[tuple[str, str]] = set()
    done: list[tuple[str, str]] = []  # in reverse: a pair enters after all that must follow it
    for root in reversed(pairs):
        stack = [(root, False)]
        while stack:
            pair, expanded = stack.pop()
            if expanded:
                done.append(pair)
            elif pair not in visited:
                visited.add(pair)
                stack.append((pair, True))
                stack += [(follower, False) for follower in starting_with.get(pair[1], ())]
    return done[::-1]


def _normalizers(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
