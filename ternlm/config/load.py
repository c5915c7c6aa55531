"""Reads a recipe: TOML file -> table -> `section.field=value` overrides -> checked, frozen Config.

Everything that is wrong is reported at once, before anything is allocated. What the data paths hold is
looked at when they are opened, not here.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ternlm.config.explain import explain
from ternlm.config.parallel import spelled_out
from ternlm.config.run import Config
from ternlm.config.section import ConfigError, Section
from ternlm.config.sft import SftConfig

S = TypeVar("S", bound=Section)


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a pretraining recipe; see `load_recipe`."""
    return load_recipe(Config, recipe, overrides)


def load_sft_config(recipe: str | Path, overrides: Sequence[str] = ()) -> SftConfig:
    """Read a fine-tuning recipe; see `load_recipe`."""
    return load_recipe(SftConfig, recipe, overrides)


def load_any_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config | SftConfig:
    """Read a recipe of either kind; one without a model's shape is for fine-tuning."""
    fine_tuning = "model" not in read_table(find_recipe(recipe))
    return load_sft_config(recipe, overrides) if fine_tuning else load_config(recipe, overrides)


def load_recipe(root: type[S], recipe: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read a recipe, by path or by its name in the folder `recipes`, and apply overrides.

    An override is `section.field=value`. The value is read as TOML where it is TOML (`optimizer.lr=1e-3`,
    `optimizer.betas=[0.9, 0.95]`), else it is text. Items of lists are addressed by number, as in
    `data.sources.0.weight=2`; the number after the last one appends. A section that a run may do without is left out
    by `none`: `adapter=none`.
    """
    path = find_recipe(recipe)
    table = read_table(path)
    for override in overrides:
        _override(table, override)
    return _validate(root, table, str(path))


def config_from_dict(d: Mapping[str, Any]) -> Config:
    """Check a nested table of settings, such as a saved config."""
    return _validate(Config, d)


def config_to_dict(config: Section) -> dict[str, Any]:
    """Return the settings as a nested table of values that TOML and JSON have; unset ones are left out."""
    return config.model_dump(mode="json", by_alias=True, exclude_none=True)


def find_recipe(recipe: str | Path) -> Path:
    """Return a recipe's file, given its path or its bare name (`debug`) in the folder `recipes`."""
    path = Path(recipe)
    for candidate in (path, Path("recipes") / path, Path("recipes") / f"{path}.toml"):
        if candidate.is_file():
            return candidate
    near = list_recipes() or sorted(path.parent.glob("*.toml"))
    close = difflib.get_close_matches(path.stem, [p.stem for p in near], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    there = f"recipes here: {', '.join(map(str, near))}" if near else "there is no folder `recipes` here"
    raise ConfigError(f"recipe {str(recipe)!r} is not a file; {hint}{there}")


def list_recipes() -> list[Path]:
    """Return the recipes in the folder `recipes` of the current directory."""
    return sorted(Path("recipes").glob("*.toml"))


def load_section(section: type[S], path: Path) -> S:
    """Read a TOML file that is one section; raises ConfigError that names all that is wrong in it."""
    return _validate(section, read_table(path), str(path))


def read_table(path: Path) -> dict[str, Any]:
    """Read a TOML file, whatever it holds; raises ConfigError where it isn't TOML."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        line = at[1] if at else str(text.count("\n") + 1)  # else the message says: at end of document
        message = str(error).removesuffix(at[0] if at else "")
        raise ConfigError(f"{path}:{line}: not TOML: {message}") from error


def _validate(section: type[S], table: Mapping[str, Any], origin: str = "") -> S:
    try:
        return section.model_validate(dict(table))
    except ValidationError as error:
        raise explain(error, section, origin) from None


def _override(table: dict[str, Any], override: str) -> None:
    """Set one `section.field=value` in the nested `table`; sections on the way are created."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if "parallel" in table and parts[0] == "parallel":
        table["parallel"] = spelled_out(table["parallel"])
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} must look like section.field=value")
    if len(parts) == 1 and text.strip() == "none" and isinstance(table.get(parts[0], {}), dict):
        table[parts[0]] = None
        return
    try:
        _put(table, parts, _value(text))
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from None


def _put(place: Any, parts: list[str], value: Any) -> Any:
    """Return `place`, a table, list or nothing yet, with `value` put in at `parts`."""
    if not parts:
        return value
    part, *rest = parts
    if place is None:
        place = [] if part.isdecimal() else {}
    if isinstance(place, list):
        index = _index(place, part)
        place[index : index + 1] = [_put(place[index] if index < len(place) else None, rest, value)]
    elif isinstance(place, dict):
        place[part] = _put(place.get(part), rest, value)
    else:
        raise ConfigError(f"there is no {part} in a value, {place!r}; only sections have settings")
    return place


def _index(items: list[Any], part: str) -> int:
    if part.isdecimal() and int(part) <= len(items):
        return int(part)
    raise ConfigError(f"there is no {part} in a list of {len(items)}; give a number from 0, or {len(items)} to append")


def _value(text: str) -> Any:
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text.lstrip()[:1] in ("[", "{", '"', "'"):  # meant as TOML
            raise ConfigError(f"not TOML: {error}") from error
        return text
    return read["value"] if len(read) == 1 else text
