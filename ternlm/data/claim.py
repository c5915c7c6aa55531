"""Whose a prepared folder is: the plan it was begun with is kept in it, and another is refused, with the difference."""

import json
import os
from pathlib import Path
from typing import Any

from ternlm.data.atomic import is_temporary, write_atomically
from ternlm.data.errors import DataError
from ternlm.data.tokenizer import TOKENIZER_FILE, Tokenizer

PLAN = "plan.json"


def claim_folder(folder: Path, plan: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Make the folder this plan's, with a copy of the tokenizer; refuse one that is anything else's."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {name for name in os.listdir(folder) if not is_temporary(name)}
    if PLAN in names:
        try:
            before = json.loads((folder / PLAN).read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{folder / PLAN}: damaged ({error}); delete {folder} and begin again") from error
        if before != plan:
            raise DataError(
                f"{folder} was begun with another plan: {_difference(before, plan)}. Give the inputs, tokenizer "
                f"and options it was begun with, choose another folder, or delete {folder} to begin again"
            )
    elif names:
        raise DataError(
            f"{folder} holds other files (such as {min(names)}) and no {PLAN}; choose a new or empty folder"
        )
    else:
        write_atomically(folder / PLAN, (json.dumps(plan, ensure_ascii=False) + "\n").encode())
    if TOKENIZER_FILE not in names:
        tokenizer.save(folder)


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Say in words the first thing in which two plans differ."""
    if before.get("version") != now["version"]:
        return f"plan version {before.get('version')}, now {now['version']}"
    if before["tokenizer"] != now["tokenizer"]:
        return f"tokenizer {before['tokenizer'][:12]}..., now {now['tokenizer'][:12]}... (fingerprints)"
    then = {entry["name"]: entry for entry in before["inputs"]}
    today = {entry["name"]: entry for entry in now["inputs"]}
    for name in sorted(then.keys() | today.keys()):
        if name not in today:
            return f"input {name} is missing now"
        if name not in then:
            return f"input {name} is new"
        for key, value in then[name].items():
            if value != today[name][key]:
                return f"input {name} had {key} {value}, now {today[name][key]}"
    return _option_difference(before["options"], now["options"]) or "the inputs have other contents now"


def _option_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    kinds = ["texts" if options.get("conversations") is None else "conversations" for options in (before, now)]
    if kinds[0] != kinds[1]:
        return f"it was begun for {kinds[0]}, now it is for {kinds[1]}"
    for key, value in before.items():
        if isinstance(value, dict):
            found = _option_difference(value, now[key])
            if found:
                return found
        elif value != now[key]:
            return f"{key} was {value}, now {now[key]}"
    return None
