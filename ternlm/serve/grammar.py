"""Grammars of answers, as llguidance takes them: calls of tools that are asked for, JSON, what keeps to a schema."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

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
    choices = []
    for index, function in enumerate(functions):
        place = f"#/anyOf/{index}/properties/{form.arguments}"
        choices.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    form.arguments: _moved(function.parameters or _NOTHING, place),
                },
                "required": ["name", form.arguments],
                "additionalProperties": False,
            }
        )
    call = _json({"anyOf": choices})
    special = {tokenizer.token_of(index) for index in form.marks(tokenizer)}
    begin, end = (_text(part, special) for part in (form.begin, form.end))
    if not begin:
        return f"start: call\ncall: {call}"
    more = f' ("\\n"? {begin} "\\n" call "\\n"? {end})*' if several else ""
    return f'start: {begin} "\\n" call "\\n"? {end}{more}\ncall: {call}'


def _moved(schema: Any, place: str) -> Any:
    """Return a schema that stands at a place of another one: what it refers to within itself is found there."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    own = schema.get("$ref")
    if isinstance(own, str) and (own == "#" or own.startswith("#/")):
        moved["$ref"] = place + own[1:]
    return moved


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
