"""Byte-level BPEs in GGUF: how each `tokenizer.ggml.pre` splits text into words, as a `tokenizers` JSON says it."""

from collections.abc import Mapping
from typing import Any

# GPT-2's words: contractions, letters, digits or signs with the space before them, blanks.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# Llama 3's and Qwen 2's begin with contractions in either case, which tokenizers spell in these ways.
_CONTRACTIONS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"'(?i:s|t|re|ve|m|ll|d)",
    r"'(?i:[sdmt]|ll|ve|re)",
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
)
_REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_STEPS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_bytes(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)],
    "default": [
        *(_split(pattern) for pattern in (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        _bytes(use_regex=False),
    ],
    **{pre: [_split(_CONTRACTIONS[0] + _REST % digits), _bytes(use_regex=False)] for pre, digits in _DIGITS.items()},
}
PRE_TYPES = tuple(_STEPS)


def canonical_pre(pre: str) -> str | None:
    """Return the name by which a `tokenizer.ggml.pre` is known here, or None where it isn't."""
    pre = _ALIASES.get(pre, pre)
    return pre if pre in _STEPS else None


def bpe_json(pre: str, vocabulary: Mapping[str, int], merges: list[str], added: Mapping[str, bool]) -> dict[str, Any]:
    """Return the `tokenizers` JSON of a byte-level BPE.

    pre: of `PRE_TYPES`. added: the tokens that are found in text before it is split into words, and whether they are
    special. Text is normalised for qwen2, as its own tokenizer does; llama.cpp doesn't.
    """
    steps = _STEPS[pre]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocabulary[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": special,
            }
            for token, special in added.items()
        ],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": dict(vocabulary),
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }


def pre_of_json(content: Mapping[str, Any]) -> str | None:
    """Return the `tokenizer.ggml.pre` that splits text as a tokenizers JSON does, or None where there is none."""
    normalizer, model = content.get("normalizer"), content["model"]
    changed = any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    if model.get("type") != "BPE" or changed or model.get("byte_fallback"):
        return None
    splitter = content.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter]) if splitter.get("type") == "Sequence" else [splitter]
    steps = [_without_spelling(step) for step in steps]
    found = [pre for pre, known in _STEPS.items() if steps == [_without_spelling(step) for step in known]]
    if not found or normalizer not in ((None, {"type": "NFC"}) if found[0] == "qwen2" else (None,)):
        return None
    return found[0]


def _without_spelling(step: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step without what doesn't matter for ids, and its contractions in the first of their spellings."""
    step = {"use_regex": True, **step} if step.get("type") == "ByteLevel" else dict(step)
    step.pop("trim_offsets", None)
    pattern = step.get("pattern", {}).get("Regex")
    if pattern is not None:
        for spelling in _CONTRACTIONS:
            if pattern.startswith(spelling + "|"):
                step["pattern"] = {"Regex": _CONTRACTIONS[0] + pattern.removeprefix(spelling)}
    return step
