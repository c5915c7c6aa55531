"""Grammars of answers, as llguidance takes them: calls of tools that are asked for, JSON, what keeps to a schema."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ternlm.config.section import ConfigError
from ternlm.data.tokenizer import Tokenizer
from ternlm.serve.requests import Function, ResponseFormat
from ternlm.serve.tool_calls import ToolFormat

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As templates write JSON. A small model that may write blanks at will never ends."""
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
_MARK = re.compile(r"<[^<>\s]+>")


def grammar_of_format(form: ResponseFormat | None) -> str | None:
    """Return the grammar of an answer's form; None: any text will do."""
    if form is None or form.type == "text":
        return None
    schema = {"type": "object"} if form.json_schema is None else form.json_schema.schema_
    return "start: " + _json(schema)


def grammar_of_calls(form: ToolFormat, tokenizer: Tokenizer, functions: Sequence[Function], several: bool) -> str:
    """Return the grammar of an answer that calls one of the functions, or several times, and says nothing else."""
    choices = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function.name},
                form.arguments: function.parameters or _NOTHING,
            },
            "required": ["name", form.arguments],
            "additionalProperties": False,
        }
        for function in functions
    ]
    # Definitions in a function's schema are looked for at the top.
    definitions = _definitions(functions)
    call = _json({"anyOf": choices, **definitions} if len(choices) > 1 else {**choices[0], **definitions})
    special = {tokenizer.token_of(index) for index in form.marks(tokenizer)}
    begin, end = (_text(part, special) for part in (form.begin, form.end))
    if not begin:
        return f"start: call\ncall: {call}"
    more = f' ("\\n"? {begin} "\\n" call "\\n"? {end})*' if several else ""
    return f'start: {begin} "\\n" call "\\n"? {end}{more}\ncall: {call}'


def _definitions(functions: Sequence[Function]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in ("$defs", "definitions"):
        merged: dict[str, Any] = {}
        for function in functions:
            own = (function.parameters or {}).get(key)
            for name, schema in own.items() if isinstance(own, Mapping) else ():
                if merged.setdefault(name, schema) != schema:
                    raise ConfigError(f"two tools define {name[:64]!r} differently; give one of them another name")
        if merged:
            found[key] = merged
    return found


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({"x-guidance": _SPACING, **schema})


def _text(part: str, special: set[str]) -> str:
    """Write a text as a grammar does: special tokens by name, anything else in quotes."""
    if not part:
        return ""
    pieces, place = [], 0
    for mark in _MARK.finditer(part):
        if mark[0] in special:
            if mark.start() > place:
                pieces.append(json.dumps(part[place : mark.start()]))
            pieces.append(mark[0])
            place = mark.end()
    if place < len(part):
        pieces.append(json.dumps(part[place:]))
    return " ".join(pieces)
