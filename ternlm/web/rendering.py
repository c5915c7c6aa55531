r"""A model's Markdown made Streamlit's: formulas in `\( \)` and `\[ \]` in dollars, other dollars plain, no pictures.

Code stays as it is. Pictures become links: showing one would fetch an address that a text tells.
"""

import re
from collections.abc import Iterator

_FENCE = re.compile(r"[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(`{3,}(?=[^`]*$)|~{3,})")
_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])(?:[ \t]+|$)")
_TICKS = re.compile(r"(?<!`)`+")
_INSIDE = r"(?:(?!\n[ \t]*\n).)+?"
_MARKS = re.compile(
    rf"""
      (?<!\\)\\\((?P<inline>{_INSIDE})(?<!\\)\\\)
    | (?<!\\)\\\[(?P<display>{_INSIDE})(?<!\\)\\\]
    | (?P<kept>(?<!\\)\$\${_INSIDE}(?<!\\)\$\$ | (?<!\\)\$(?![\s$])(?:\\.|[^$\\\n])*(?<!\s)\$(?!\d))
    | (?P<dollar>(?<!\\)\$)
    | (?P<picture>(?<!\\)!(?=\[))
    """,
    re.VERBOSE | re.DOTALL,
)
_MARKUP = re.compile(r"[\\`*_{}\[\]()#+\-.!$~|<>:&]")
_THOUGHT = re.compile(r"\s*<think>(.*?)(?:</think>|$)", re.DOTALL)


def for_streamlit(text: str, *, keep_breaks: bool = False) -> str:
    """Return Markdown as Streamlit shows it. keep_breaks: a line's end is one, as somebody typed it."""
    parts = []
    for is_code, block in _blocks(text):
        if is_code:
            parts.append(block)
            continue
        for is_code, piece in _spans(block):
            parts.append(piece if is_code else _convert(piece, keep_breaks))
    return "".join(parts)


def split_thoughts(text: str) -> tuple[str, str]:
    """Return what an answer begins with between `<think>` and `</think>`, and the rest."""
    found = _THOUGHT.match(text)
    if not found:
        return "", text
    return found[1].strip(), text[found.end() :].lstrip()


def plain(text: str) -> str:
    """Return Markdown that shows a text as it is."""
    return _MARKUP.sub(r"\\\g<0>", text)


def fenced(text: str, language: str = "") -> str:
    """Return a text as a block of code, whatever ticks it holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _blocks(text: str) -> Iterator[tuple[bool, str]]:
    """Cut a text between blocks of code (True) and the rest."""
    held: list[str] = []
    fence, was_code, after_blank, in_list = "", False, True, False
    for line in text.splitlines(keepends=True):
        bare = line.rstrip("\r\n")
        if fence:
            is_code = True
            if bare.strip(" \t>") and set(bare.strip(" \t>")) == {fence[0]} and bare.count(fence[0]) >= len(fence):
                fence = ""
        elif found := _FENCE.match(bare):
            is_code, fence = True, found[1]
        elif not bare.strip():
            is_code = was_code
        else:
            indented = line.startswith(("    ", "\t"))
            if _ITEM.match(bare) and not (indented and after_blank and not in_list):
                in_list = True
            elif after_blank and not line.startswith((" ", "\t")):
                in_list = False
            is_code = indented and not in_list and (after_blank or (was_code and held[-1].startswith(("    ", "\t"))))
        if held and is_code != was_code:
            yield was_code, "".join(held)
            held = []
        held.append(line)
        was_code, after_blank = is_code, not bare.strip()
    if held:
        yield was_code, "".join(held)


def _spans(text: str) -> Iterator[tuple[bool, str]]:
    """Cut a text between spans of code (True) and the rest."""
    place = 0
    for found in _TICKS.finditer(text):
        if found.start() < place or text[found.start() - 1 : found.start()] == "\\":
            continue
        end = re.compile(rf"(?<!`){found[0]}(?!`)").search(text, found.end())
        if end is None or re.search(r"\n[ \t]*\n", text[found.end() : end.start()]):
            continue
        yield False, text[place : found.start()]
        yield True, text[found.start() : end.end()]
        place = end.end()
    yield False, text[place:]


def _convert(text: str, keep_breaks: bool) -> str:
    """Return prose with its formulas in dollars, and without pictures."""
    parts, place = [], 0
    for found in _MARKS.finditer(text):
        parts.append(_broken(text[place : found.start()], keep_breaks))
        place = found.end()
        if found["kept"]:
            parts.append(found[0])
        elif found["dollar"] or found["picture"]:
            parts.append("\\" + found[0])
        elif "$" in (found["inline"] or found["display"]):
            parts.append(found[0])
        elif found["inline"] is not None:
            parts.append(f"${' '.join(found['inline'].split())}$")
        else:
            parts.append(_display(found["display"], text, found.start(), found.end()))
    parts.append(_broken(text[place:], keep_breaks))
    return "".join(parts)


def _broken(text: str, keep_breaks: bool) -> str:
    return re.sub(r"(?<=\S)\n(?=\S)", "  \n", text) if keep_breaks else text


def _display(formula: str, text: str, start: int, end: int) -> str:
    """Return a formula as a block of its own, indented like what it stands in."""
    before = text[text.rfind("\n", 0, start) + 1 : start]
    after = text[end:].partition("\n")[0]
    item = _ITEM.match(before)
    indent = " " * item.end() if item else before[: len(before) - len(before.lstrip(" \t>"))]
    alone = not before.strip(" \t>") or (item is not None and item.end() == len(before))
    lines = [line.strip(" \t>") for line in formula.strip().splitlines()]
    block = f"\n{indent}".join(["$$", *(line for line in lines if line), "$$"])
    return ("" if alone else f"\n\n{indent}") + block + (f"\n\n{indent}" if after.strip() else "")
