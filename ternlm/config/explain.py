"""Turns pydantic's validation errors into one message for the person who wrote the recipe.

Every problem becomes a line: the setting's dotted name, its value, the rule it breaks, and what to do.
"""

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ternlm.config.section import ConfigError, Section, fields_of, section_in

# pydantic's wording where TOML's is clearer
RULES = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "tuple_type": "must be a list",
    "model_type": "must be a table of settings",
    "string_type": "must be text in quotes (on a command line: 'field=\"value\"')",
}


def explain(error: ValidationError, root: type[Section], origin: str = "") -> ConfigError:
    """Return the error to raise for what `root` found wrong with the settings read from `origin`."""
    errors = error.errors(include_url=False)
    # A list whose items are wrong is also reported as too short: only the innermost place is of use.
    outer = {details["loc"][:i] for details in errors for i in range(len(details["loc"]))}
    problems = [_line(details, root) for details in errors if details["loc"] not in outer]
    count = "a setting is wrong" if len(problems) == 1 else f"{len(problems)} settings are wrong"
    return ConfigError("\n  ".join([f"{origin}: {count}" if origin else count, *problems]))


def dotted(loc: tuple[int | str, ...]) -> str:
    """Return a place in the settings as one writes it in an override, such as data.sources.0.weight."""
    return ".".join(map(str, loc))


def describe(field: FieldInfo) -> str:
    """Return a setting's help text in one line, with its unit."""
    extra = field.json_schema_extra
    unit = f" [{extra['unit']}]" if isinstance(extra, dict) and extra.get("unit") else ""
    return " ".join((field.description or "").split()) + unit


def _line(details: ErrorDetails, root: type[Section]) -> str:
    loc, kind, value = details["loc"], details["type"], details["input"]
    where, (section, field) = dotted(loc), _find(root, loc)
    if kind == "value_error":  # raised by a section's own check, whose message is whole
        message = str(details["ctx"]["error"])
        return f"{where}: {message}" if where else message
    if kind == "missing":
        add = f"add [{where}]" if field and section_in(field.annotation) else f"set {where}"
        return f"{where} is missing; {add}{_help(field)}"
    if kind == "extra_forbidden":
        return f"{where} = {_shown(value)} is not a setting; {_suggestion(root, section, loc)}"
    rule = RULES.get(kind) or re.sub(r"^\w+ should ", "must ", details["msg"])
    if kind == "literal_error":
        close = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", rule), n=1)
        rule += f"; did you mean '{close[0]}'?" if close else ""
    return f"{where} = {_shown(value)} {rule}{_help(field)}"


def _find(root: type[Section], loc: tuple[int | str, ...]) -> tuple[type[Section], FieldInfo | None]:
    """Return the innermost section on the way to `loc`, and the setting there (None for an unknown one)."""
    section, field = root, None
    for part in loc:
        if isinstance(part, int):
            continue
        section = (section_in(field.annotation) if field else None) or section
        field = fields_of(section).get(part)
        if field is None:
            break
    return section, field


def _help(field: FieldInfo | None) -> str:
    return f" ({describe(field)})" if field and field.description else ""


def _suggestion(root: type[Section], section: type[Section], loc: tuple[int | str, ...]) -> str:
    name, parent = str(loc[-1]), dotted(loc[:-1])
    own = fields_of(section)
    everywhere = dict(_settings(root))
    words = name.lower().split("_")
    similar = difflib.get_close_matches(name, own, n=1)
    found = (
        [place for place in everywhere if place.split(".")[-1] == name]  # right name, wrong section
        or [f"{parent}.{match}".lstrip(".") for match in similar]
        or [p for p in everywhere if difflib.SequenceMatcher(None, name, p.split(".")[-1]).ratio() > 0.8]
        or [p for p, field in everywhere.items() if all(word in describe(field).lower() for word in words)]
    )
    if found:
        return f"did you mean {' or '.join(found[:3])}?"
    return f"{f'[{parent}]' if parent else 'the top level'} has {', '.join(own)}"


def _settings(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name of every setting below `section` that is no section itself."""
    for name, field in fields_of(section).items():
        inner = section_in(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            many = str(field.annotation).startswith("tuple[")
            yield from _settings(inner, f"{prefix}{name}.{'0.' if many else ''}")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
