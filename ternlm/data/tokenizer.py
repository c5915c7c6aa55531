"""Text to ids and back: one Tokenizer over tokenizers JSON files and sentencepiece models, and BPE training.

`prepare` encodes with it, checkpoints carry a copy, generation decodes with it. It knows no chat templates.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from ternlm.data.atomic import write_atomically
from ternlm.data.errors import DataError
from ternlm.data.sentencepiece import SPACE, build_bpe, parse_model
from ternlm.data.typed import ChatEncoder, encode_text

TOKENIZER_FILE, MODEL_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]")
# Words with the sign before them, digits by threes, runs of signs, line ends and the blanks before them, blanks.
_WORDS = (
    r"'(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTED)
_BYTES = {chr(byte): bytes([byte]) for byte in _PRINTED} | {chr(256 + i): bytes([b]) for i, b in enumerate(_OTHERS)}
"""GPT-2's alphabet: characters that stand for bytes."""


class Tokenizer:
    """Text to ids and back.

    Special tokens (<s>, </s>, ...) typed in a text are plain text: only bos_id, eos_id and id_of() give their
    ids. A sentencepiece model's user-defined pieces, such as InternLM's <eoh>, are found in text, as
    sentencepiece does.
    """

    def __init__(self, text: str, config: dict[str, Any] | None = None, model: bytes | None = None) -> None:
        """Take a tokenizer.json's text, tokenizer_config.json's content, and the .model it was made from."""
        self._text = text
        self._config = config or {}
        self._model = model
        self._backend = tokenizers.Tokenizer.from_str(text)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.kind: Literal["tokenizers", "sentencepiece"] = "tokenizers" if model is None else "sentencepiece"
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id = self._named("bos_token", _BOS_NAMES)
        self.eos_id = self._named("eos_token", _EOS_NAMES)

    def encode(self, text: str) -> list[int]:
        """Encode plain text, without bos and eos."""
        return encode_text(self._backend, text)

    def encode_markup(self, text: str) -> list[int]:
        """Encode a text in which special tokens mean themselves, such as what a chat template adds."""
        return encode_text(self._markup, text)

    def markup_in(self, text: str) -> list[str]:
        """List the special and other added tokens that `encode_markup` finds in a text, in order."""
        added = self._backend.get_added_tokens_decoder()
        return [added[index].content for index in self.encode_markup(text) if index in added]

    def encode_typed(self, text: str) -> list[int]:
        """Encode what somebody typed: no special or added token, whatever the text looks like."""
        return self.chat_encoder.encode_typed(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode plain texts; with TOKENIZERS_PARALLELISM=false in one thread, else in many."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_document(self, text: str) -> list[int]:
        """Encode a text as a document of its own: bos and eos around it, where the tokenizer has them."""
        bos = [] if self.bos_id is None else [self.bos_id]
        eos = [] if self.eos_id is None else [self.eos_id]
        return bos + self.encode(text) + eos

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Turn ids into text; bytes that aren't UTF-8, as in half a character, become U+FFFD."""
        ids = [int(index) for index in ids]
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise DataError(
                    f"id {index} is outside the tokenizer's vocabulary of {self.vocab_size}; "
                    "decode with the tokenizer that made the ids"
                )
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int:
        """Look up the id of a token by its exact text, such as <eoh>."""
        index = self._backend.token_to_id(token)
        if index is None:
            raise DataError(f"the tokenizer has no token {token!r} (vocabulary {self.vocab_size})")
        return index

    def renamed(self, names: Mapping[int, str]) -> "Tokenizer":
        """Return a tokenizer in which these ids are special tokens of these names; all other ids stay as they are."""
        content = json.loads(self._text)
        vocab = content["model"]["vocab"]
        spelt = {index: piece for piece, index in vocab.items()}
        for index, name in names.items():
            if index in spelt:
                del vocab[spelt[index]]
            vocab[name] = index
        kept = [token for token in content.get("added_tokens") or [] if token["id"] not in names]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [{"id": index, "content": name, **flags} for index, name in names.items()]
        content["added_tokens"] = sorted(kept + added, key=lambda token: token["id"])
        return Tokenizer(json.dumps(content, ensure_ascii=False), self._config, self._model)

    def token_of(self, index: int) -> str:
        """Look up a token as the vocabulary spells it, for display."""
        token = self._backend.id_to_token(index)
        if token is None:
            raise DataError(f"the tokenizer has no id {index} (vocabulary {self.vocab_size})")
        return token

    def token_bytes(self) -> np.ndarray:
        """Count the UTF-8 bytes that each id stands for (int32, vocabulary); 0 for special tokens.

        Over the ids of a text they add up to the text's bytes, unless the tokenizer changes text:
        sentencepiece takes a literal U+2581 for a space, and some models add a space or normalise Unicode.
        """
        return np.array([len(piece) for piece in self.pieces], dtype=np.int32)

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """The bytes that each id stands for in a text; none for special tokens and ids that no token has."""
        spelling = _spelling(json.loads(self._text))
        added = self._backend.get_added_tokens_decoder()
        pieces = [b""] * self.vocab_size
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index in self.special_ids:
                continue
            if index in added or spelling == "plain":
                pieces[index] = token.encode()
            elif spelling == "bytes":
                pieces[index] = b"".join(_BYTES.get(character) or character.encode() for character in token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                pieces[index] = bytes([int(token[3:5], 16)])
            else:
                pieces[index] = token.replace(SPACE, " ").encode()
        return tuple(pieces)

    @cached_property
    def _markup(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self._text)
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def chat_encoder(self) -> ChatEncoder:
        """What encodes conversations, keeping what was typed from becoming a token."""
        return ChatEncoder(self._text)

    @cached_property
    def fingerprint(self) -> str:
        """Hash (SHA-256) of all that ids depend on; the same for a .model file and its converted copy."""
        content = json.loads(self._text)
        model = content["model"]
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges", ())]
        relevant = {
            "model": {**model, "merges": merges},
            "added": content.get("added_tokens"),
            "normalizer": content.get("normalizer"),
            "pre_tokenizer": content.get("pre_tokenizer"),
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
        }
        canonical = json.dumps(relevant, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return what a manifest tells of the tokenizer that made its tokens."""
        return {
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "kind": self.kind,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
        }

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, if made from one, tokenizer.model into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        defaults = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None if self.bos_id is None else self.token_of(self.bos_id),
            "eos_token": None if self.eos_id is None else self.token_of(self.eos_id),
            "clean_up_tokenization_spaces": False,
        }
        config = json.dumps(defaults | self._config, indent=2, ensure_ascii=False, sort_keys=True)
        write_atomically(folder / CONFIG_FILE, (config + "\n").encode())
        if self._model is not None:
            write_atomically(folder / MODEL_FILE, self._model)
        write_atomically(folder / TOKENIZER_FILE, self._text.encode())

    def _named(self, role: str, known: tuple[str, ...]) -> int | None:
        """Find the id of bos or eos: tokenizer_config.json's, else the first special of a known name."""
        if role in self._config:
            token = self._config[role]
            token = token.get("content") if isinstance(token, dict) else token
            return None if token is None else self.id_of(token)
        ids = [self._backend.token_to_id(name) for name in known]
        return next((index for index in ids if index in self.special_ids), None)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.json, a sentencepiece .model, or a folder that holds one (the .json first)."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"no tokenizer at {path}; give a tokenizer.json, a sentencepiece .model or a folder")
    file = _tokenizer_in(path) if path.is_dir() else path
    config = _read_config(file.parent / CONFIG_FILE)
    if file.suffix == ".model":
        content = file.read_bytes()
        model = parse_model(content, str(file))
        controls = {piece: piece in model.of_type(3) for piece in (model.bos_piece, model.eos_piece)}
        own = {
            "bos_token": model.bos_piece if controls[model.bos_piece] else None,
            "eos_token": model.eos_piece if controls[model.eos_piece] else None,
        }
        return Tokenizer(build_bpe(model).to_str(), config | own, content)
    model_file = file.parent / MODEL_FILE
    if file.name != TOKENIZER_FILE and file.suffix != ".json":
        raise DataError(f"{file}: a tokenizer is a tokenizers .json or a sentencepiece .model file")
    try:
        return Tokenizer(file.read_text("utf-8"), config, model_file.read_bytes() if model_file.exists() else None)
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception for JSON that isn't a tokenizer
        raise DataError(f"{file}: not a tokenizers JSON file ({error})") from error


def train_bpe(texts: Iterator[str], vocab_size: int, special_tokens: tuple[str, ...] = ("<s>", "</s>")) -> Tokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer. `special_tokens` get the first ids."""
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise DataError(
            f"vocab_size = {vocab_size} is too small: a byte-level vocabulary holds 256 bytes and "
            f"{len(special_tokens)} special tokens, so at least {smallest}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    learnt = backend.get_vocab_size()
    if learnt < vocab_size:
        raise DataError(
            f"the text gave only {learnt} tokens, not vocab_size = {vocab_size}; "
            f"give more text or set the vocabulary size to {learnt} or less"
        )
    bos = next((token for token in special_tokens if token in _BOS_NAMES), None)
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special_tokens.index(bos))]
        )
    tokenizer = Tokenizer(backend.to_str())
    for token in special_tokens:
        if tokenizer.special_ids & set(tokenizer.encode(token)):
            raise DataError(
                f"the text holds {token!r} so often that it became an ordinary token; choose a special token "
                "of several kinds of characters, such as <|name|>"
            )
    return tokenizer


def _tokenizer_in(folder: Path) -> Path:
    if (folder / TOKENIZER_FILE).exists():
        return folder / TOKENIZER_FILE
    found = sorted(folder.glob("*.model"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(f"{folder} holds no tokenizer.json and not just one .model file ({names}); name the file")
    return found[0]


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise DataError(f"{file}: must hold a JSON object, not {type(config).__name__}")
    return config


def _spelling(content: dict[str, Any]) -> Literal["bytes", "spaces", "plain"]:
    """Tell how a vocabulary spells bytes: GPT-2's byte alphabet, sentencepiece's way, or as they are."""
    decoder = content.get("decoder") or {}
    steps = {step.get("type") for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        return "bytes"
    if steps & {"ByteFallback", "Metaspace"}:
        return "spaces"
    if steps <= {None, "Fuse"}:
        return "plain"
    raise DataError(
        f"can't tell how many bytes a token stands for with the decoder {'+'.join(map(str, steps))}; "
        "byte-level and sentencepiece-like tokenizers are supported"
    )
