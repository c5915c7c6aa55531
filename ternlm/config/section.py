"""What every settings section is: frozen, strict, and described field by field.

Sections are plain pydantic models. A field's help text, unit and effect live beside its default, and feed
`tern config show`, `tern config schema` and error messages. Nothing here knows any particular section.
"""

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class UserError(ValueError):
    """Something the user can put right; the command line prints the message alone, without a traceback."""


class ConfigError(UserError):
    """A setting is wrong. The message names it, its value, the rule and the remedy."""


class Section(BaseModel):
    """A frozen group of settings: unknown fields, other types than declared, NaN and infinity are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        populate_by_name=True,
        allow_inf_nan=False,
    )


def setting(default: Any = ..., help: str = "", unit: str = "", **rules: Any) -> Any:
    """Declare a setting: its default, what it does, its unit and pydantic's rules (`gt`, `ge`, `le`, ...).

    A section given as default stands for that section with its own defaults.
    """
    extra: dict[str, Any] | None = {"unit": unit} if unit else None
    if isinstance(default, type):
        return Field(default_factory=default, description=help, json_schema_extra=extra, **rules)
    return Field(default, description=help, json_schema_extra=extra, **rules)


def refuse_ignored(section: Section, names: Iterable[str], where: str, remedy: str) -> None:
    """Raise ValueError for the first of the settings that was changed though it does nothing.

    where: the other setting that makes it idle. A value equal to the default passes: rendered settings hold all.
    """
    for name in names:
        value = getattr(section, name)
        default = type(section).model_fields[name].get_default(call_default_factory=True)
        if value != default:
            shown, usual = (list(v) if isinstance(v, tuple) else v for v in (value, default))
            leave = "leave it out" if default is None else f"leave it at its default, {usual!r}"
            raise ValueError(f"{name} = {shown!r} has no effect with {where}; {leave}, or {remedy}")


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """Return a section's settings by the name they have in a recipe."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_in(annotation: Any) -> type[Section] | None:
    """Return the section that a setting's type holds (`S`, `S | None` or `tuple[S, ...]`), if any."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None
