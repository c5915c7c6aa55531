"""The page's words: the same in both languages, and none on the page that isn't among them."""

import ast
import string
from pathlib import Path

import pytest

from ternlm.web.words import Mistake, load_words

WEB = Path(__file__).parents[2] / "ternlm" / "web"
WORDS = load_words()


def gaps(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_languages_have_the_same_names_and_gaps() -> None:
    assert set(WORDS) == {"en", "zh"}
    english, chinese = WORDS["en"].texts, WORDS["zh"].texts
    assert list(english) == list(chinese)
    assert {name: gaps(text) for name, text in english.items()} == {name: gaps(text) for name, text in chinese.items()}
    assert all(text.strip() for words in WORDS.values() for text in words.texts.values())


def test_chinese_is_chinese() -> None:
    same = {"language_name", "top_p", "top_k", "min_p"}
    english, chinese = WORDS["en"].texts, WORDS["zh"].texts
    assert {name for name in chinese if not any("\u4e00" <= each <= "\u9fff" for each in chinese[name])} <= same
    assert all(text.isascii() or set(text) & set("…“”") for name, text in english.items())


def names_used() -> set[str]:
    """Texts in the code that are names: given to `words(...)` or `Mistake(...)`, or said to be."""
    used = set()
    for file in WEB.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                used.add(node.value)
            if isinstance(node, ast.JoinedStr):
                first, last = (getattr(node.values[place], "value", "") for place in (0, -1))
                used |= {name for name in WORDS["en"].texts if str(first).endswith("_") and name.startswith(str(first))}
                used |= {name for name in WORDS["en"].texts if str(last).startswith("_") and name.endswith(str(last))}
    return used


def test_no_word_is_left_over() -> None:
    assert set(WORDS["en"].texts) - names_used() - {"language_name"} == set()


def test_mistakes_are_told_in_each_language() -> None:
    mistake = Mistake("tools_no_name", number=3)
    assert WORDS["en"].of(mistake) == "Tool 3 has no function with a name."
    assert WORDS["zh"].of(mistake) == "第 3 个工具没有带 name 的函数。"
    with pytest.raises(KeyError):
        WORDS["en"]("nothing")
