"""Tokenizers in GGUF, both ways: its lists of tokens, types, merges and scores, and our Tokenizer.

Two kinds: `gpt2`, byte-level BPEs (`gguf_bpe`), and `llama`, sentencepiece BPEs (`gguf_sentencepiece`).
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ternlm.convert.gguf_bpe import PRE_TYPES, bpe_json, canonical_pre, pre_of_json
from ternlm.convert.gguf_sentencepiece import sentencepiece_model
from ternlm.convert.weights import ConvertError
from ternlm.data.errors import DataError
from ternlm.data.sentencepiece import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, build_bpe, parse_model
from ternlm.data.tokenizer import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, Tokenizer

_KEY = "tokenizer.ggml."
_ENDS = ("eos", "eot", "eom")


@dataclass
class Vocabulary:
    """A tokenizer as GGUF has it; merges and pre are gpt2's, scores and spaces llama's."""

    kind: str
    tokens: list[str]
    types: list[int]
    pre: str = "default"
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = False


def stop_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the tokens that end a text or a turn, the end of text first."""
    ids = [metadata[f"{_KEY}{name}_token_id"] for name in _ENDS if f"{_KEY}{name}_token_id" in metadata]
    return list(dict.fromkeys(ids))


def read_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer | None:
    """Return the file's tokenizer, None where it has none. Raises ConvertError for a kind that isn't supported."""
    kind = metadata.get(f"{_KEY}model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise ConvertError(f"{path}: its tokenizer is {kind!r}, and gpt2 and llama are supported")
    try:
        return (_read_bpe if kind == "gpt2" else _read_sentencepiece)(path, metadata)
    except KeyError as missing:
        raise ConvertError(f"{path}: its tokenizer misses {missing}; fetch the file again") from missing
    except DataError as trouble:
        raise ConvertError(str(trouble)) from trouble
    except ConvertError:
        raise
    except Exception as trouble:  # the library raises bare Exception for what isn't a tokenizer
        raise ConvertError(f"{path}: its tokenizer is broken ({trouble}); fetch the file again") from trouble


def _read_bpe(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    tokens, types = metadata[f"{_KEY}tokens"], _types(metadata)
    named = metadata.get(f"{_KEY}pre", "default")
    pre = canonical_pre(named)
    if pre is None:
        raise ConvertError(
            f"{path}: its tokenizer splits words as {named!r}, which isn't known; known are {', '.join(PRE_TYPES)}"
        )
    vocabulary = {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    if len(vocabulary) != sum(kind != UNUSED for kind in types):
        raise ConvertError(f"{path}: its tokenizer has a token twice, so its ids can't be told apart")
    added = {
        token: kind != USER_DEFINED
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    content = bpe_json(pre, vocabulary, metadata[f"{_KEY}merges"], added)
    config = _special_tokens(metadata, tokens, add_bos=pre == "llama-bpe")
    return Tokenizer(json.dumps(content, ensure_ascii=False), config)


def _read_sentencepiece(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    tokens, types = list(metadata[f"{_KEY}tokens"]), _types(metadata)
    scores = metadata[f"{_KEY}scores"].tolist()
    while types and types[-1] == UNUSED:  # they fill the embedding's rows beyond the tokenizer
        types.pop()
    del tokens[len(types) :], scores[len(types) :]
    usual = {f"{_KEY}bos_token_id": 1, f"{_KEY}eos_token_id": 2, **metadata}
    config = _special_tokens(usual, tokens, add_bos=True)
    content = sentencepiece_model(tokens, scores, types, config["bos_token"], config["eos_token"], metadata)
    return Tokenizer(build_bpe(parse_model(content, str(path))).to_str(), config, content)


def _types(metadata: Mapping[str, Any]) -> list[int]:
    types = metadata.get(f"{_KEY}token_type")
    return [NORMAL] * len(metadata[f"{_KEY}tokens"]) if types is None else types.tolist()


def _special_tokens(metadata: Mapping[str, Any], tokens: Sequence[str], add_bos: bool) -> dict[str, Any]:
    """Return what tokenizer_config.json says; a bos is named only where texts begin with it."""
    add_bos = bool(metadata.get(f"{_KEY}add_bos_token", add_bos))
    config: dict[str, Any] = {"add_bos_token": add_bos, "bos_token": None, "eos_token": None}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"{_KEY}{key}_token_id")
        if index is not None and index < len(tokens) and (name != "bos" or add_bos):
            config[f"{name}_token"] = tokens[index]
    return config


def vocabulary_of(path: Path, tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """Return a tokenizer's vocabulary, filled up to vocab_size. `path` is of the model, for messages.

    Raises ConvertError for a tokenizer that GGUF can't say.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConvertError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, and the model's vocabulary {vocab_size}; "
            "see whether they belong together"
        )
    content, _, model = _saved(tokenizer)
    vocabulary = _from_bpe(path, content) if model is None else _from_sentencepiece(path, content, model)
    start = len(vocabulary.tokens)
    vocabulary.tokens += [f"[PAD{index}]" for index in range(start, vocab_size)]
    vocabulary.types += [UNUSED] * (vocab_size - start)
    if vocabulary.scores:
        vocabulary.scores += [-1000.0] * (vocab_size - start)
    return vocabulary


def write_tokenizer(writer: Any, vocabulary: Vocabulary, tokenizer: Tokenizer, generation: Mapping[str, Any]) -> None:
    """Add a tokenizer's metadata to a `gguf.GGUFWriter`.

    generation: the model's generation_config; its end tokens end a text beside the tokenizer's own.
    """
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == "gpt2":
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
        writer.add_remove_extra_whitespaces(vocabulary.remove_extra_whitespaces)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    bos = generation.get("bos_token_id") if tokenizer.bos_id is None else tokenizer.bos_id
    if bos is not None:
        writer.add_bos_token_id(bos)
    given = generation.get("eos_token_id", [])
    given = [given] if isinstance(given, int) else list(given)
    ends = dict.fromkeys(([] if tokenizer.eos_id is None else [tokenizer.eos_id]) + given)
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    if len(ends) > len(adders):
        raise ConvertError(
            f"GGUF names at most {len(adders)} end tokens, and generation.eos_token_id and the tokenizer name "
            f"{list(ends)}; leave some out"
        )
    for add, end in zip(adders, ends, strict=False):
        add(end)
    _, config, _ = _saved(tokenizer)
    for role, add in (("pad_token", writer.add_pad_token_id), ("unk_token", writer.add_unk_token_id)):
        token = config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            add(tokenizer.id_of(token))


def _saved(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any], bytes | None]:
    """Return tokenizer.json's and tokenizer_config.json's content, and the sentencepiece model if there is one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(folder)
        model = (folder / MODEL_FILE).read_bytes() if (folder / MODEL_FILE).exists() else None
        content = json.loads((folder / TOKENIZER_FILE).read_text("utf-8"))
        return content, json.loads((folder / CONFIG_FILE).read_text("utf-8")), model


def _from_bpe(path: Path, content: Mapping[str, Any]) -> Vocabulary:
    pre = pre_of_json(content)
    if pre is None:
        raise ConvertError(
            f"{path}: GGUF can't say how its tokenizer splits text; byte-level BPEs that do as one of "
            f"{', '.join(PRE_TYPES)} can be written, and sentencepiece BPEs with their .model file beside"
        )
    names = {index: token for token, index in content["model"]["vocab"].items()}
    size = 1 + max([*names, *(token["id"] for token in content["added_tokens"])])
    tokens = [names.get(index, f"[PAD{index}]") for index in range(size)]
    types = [NORMAL if index in names else UNUSED for index in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return _with_added(Vocabulary("gpt2", tokens, types, pre, merges), content)


def _from_sentencepiece(path: Path, content: Mapping[str, Any], model_file: bytes) -> Vocabulary:
    model = parse_model(model_file, str(path))
    vocabulary = Vocabulary(
        "llama", list(model.pieces), list(model.types), scores=list(model.scores),
        add_space_prefix=model.add_dummy_prefix, remove_extra_whitespaces=model.remove_extra_whitespaces,
    )  # fmt: skip
    return _with_added(vocabulary, content)


def _with_added(vocabulary: Vocabulary, content: Mapping[str, Any]) -> Vocabulary:
    """Put the tokens in that were added to a tokenizer: its special ones, and words found before it splits text."""
    for token in content["added_tokens"]:
        while len(vocabulary.tokens) <= token["id"]:
            vocabulary.tokens.append(f"[PAD{len(vocabulary.tokens)}]")
            vocabulary.types.append(UNUSED)
            if vocabulary.scores:
                vocabulary.scores.append(-1000.0)
        vocabulary.tokens[token["id"]] = token["content"]
        if vocabulary.types[token["id"]] != UNKNOWN:
            vocabulary.types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return vocabulary
