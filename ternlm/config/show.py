"""Writes settings out: as a commented TOML recipe, as a JSON schema for editors, as a list of differences.

What `render` writes is a recipe itself, equal to the settings it came from.
"""

import json
from collections.abc import Iterator
from typing import Any

from ternlm.config.explain import describe
from ternlm.config.load import config_to_dict
from ternlm.config.run import Config
from ternlm.config.section import Section

COMMENT_COLUMN = 40


def render(config: Section) -> str:
    """Return the settings as TOML with every field's meaning, unit and default; it reads back as the same."""
    return "\n".join(_table(config, "")).lstrip("\n") + "\n"


def json_schema(root: type[Section] = Config) -> dict[str, Any]:
    """Return the JSON schema of a recipe, by which editors complete and check it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | root.model_json_schema()


def diff(a: Section, b: Section) -> list[str]:
    """Return what changed from `a` to `b`, a line for each setting: its dotted name, old and new value."""
    old, new = dict(_leaves(config_to_dict(a))), dict(_leaves(config_to_dict(b)))
    return [
        f"{name}: {old.get(name, 'not set')} -> {new.get(name, 'not set')}"
        for name in [*old, *(name for name in new if name not in old)]
        if old.get(name) != new.get(name)
    ]


def _table(section: Section, name: str) -> Iterator[str]:
    """Yield the lines of a section and, after its own values as TOML wants it, of those inside it."""
    inner: list[tuple[str, Section, bool]] = []
    for attribute, field in type(section).model_fields.items():
        key, value = field.alias or attribute, getattr(section, attribute)
        path = f"{name}.{key}" if name else key
        if isinstance(value, Section):
            inner.append((path, value, False))
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            inner += [(path, item, True) for item in value]
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            yield _line(key, value, default, describe(field))
    for path, value, many in inner:
        yield ""
        yield f"# {' '.join((type(value).__doc__ or '').split())}"
        yield f"[[{path}]]" if many else f"[{path}]"
        yield from _table(value, path)


def _line(key: str, value: Any, default: Any, meaning: str) -> str:
    if value is None:
        return f"{f'# {key} =':<{COMMENT_COLUMN}}# (not set, default) {meaning}"
    if value == default:
        meaning = f"(default) {meaning}"
    elif default is not None:
        meaning = f"(default {_toml(default)}) {meaning}"
    return f"{f'{key} = {_toml(value)}':<{COMMENT_COLUMN}}# {meaning}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):  # TOML's escapes are JSON's, but for the DEL character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(map(_toml, value))}]"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names and values, as TOML, below a table; a list of plain values is one value."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, dict):
        yield name, _toml(value)
        return
    for key, item in value.items():
        yield from _leaves(item, f"{name}.{key}" if name else key)
