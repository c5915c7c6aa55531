"""Formulas, dollars, pictures and thoughts, and that code stays as it is."""

import pytest

from ternlm.web.rendering import fenced, for_streamlit, plain, split_thoughts


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (r"a \( x^2 \) b", "a $x^2$ b"),
        (r"\(a\), \(b\)", "$a$, $b$"),
        (r"\[ x \]", "$$\nx\n$$"),
        ("so\n\\[\n x = 1 \\\\\n y = 2\n\\]\nends", "so\n$$\nx = 1 \\\\\ny = 2\n$$\nends"),
        (r"so \[x\] ends", "so \n\n$$\nx\n$$\n\n ends"),
        ("1. \\[x\\]\n2. two", "1. $$\n   x\n   $$\n2. two"),
        ("- so\n  \\[x\\]", "- so\n  $$\n  x\n  $$"),
        ("> \\[x\\]", "> $$\n> x\n> $$"),
        (r"\[ \begin{matrix} a \\[2pt] b \end{matrix} \]", "$$\n\\begin{matrix} a \\\\[2pt] b \\end{matrix}\n$$"),
        (r"an \( that never ends", r"an \( that never ends"),
        ("an \\( that ends\n\nelsewhere \\)", "an \\( that ends\n\nelsewhere \\)"),
        (r"\\(not\\)", r"\\(not\\)"),
        (r"\(\text{$5$}\)", r"\(\text{$5$}\)"),
    ],
)
def test_formulas_get_dollars(given: str, wanted: str) -> None:
    assert for_streamlit(given) == wanted


@pytest.mark.parametrize(
    "code",
    [
        r"`\(x\)`",
        r"``a ` \[x\] $ ![p](u)``",
        "```python\nre.match(r'\\(x\\)', '$5')\n```\n",
        "~~~\n\\[x\\]\n```\n\\(y\\)\n~~~\n",
        "````md\n```\n\\(x\\)\n```\n\\(x\\)\n````",
        "```\n\\(x\\) never ends\n\n$1",
        "    indented \\(x\\)\n\n    $ and more\n",
        "- item\n\n  ```\n  \\(x\\)\n  ```\n",
        "> ```\n> \\(x\\)\n> ```\n",
    ],
)
def test_code_stays_as_it_is(code: str) -> None:
    assert for_streamlit(code) == code
    assert for_streamlit(f"\\(a\\)\n\n{code}") == f"$a$\n\n{code}"
    assert for_streamlit(code, keep_breaks=True) == code


def test_prose_around_code_is_converted() -> None:
    given = "\\(a\\) `\\(b\\)` \\(c\\)\n```\n\\(d\\)\n```\n\\(e\\)\n- one\n\n    \\(f\\)"
    assert for_streamlit(given) == "$a$ `\\(b\\)` $c$\n```\n\\(d\\)\n```\n$e$\n- one\n\n    $f$"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("from $5 to $10", r"from \$5 to \$10"),
        ("$x$ and $y_1$", "$x$ and $y_1$"),
        ("$$x$$ costs $3", r"$$x$$ costs \$3"),
        (r"\$5", r"\$5"),
        ("$ x $", r"\$ x \$"),
        ("it is 5$", r"it is 5\$"),
    ],
)
def test_only_dollars_around_formulas_stay(given: str, wanted: str) -> None:
    assert for_streamlit(given) == wanted


def test_pictures_become_links() -> None:
    assert for_streamlit("![a](http://x/y) [b](c)") == r"\![a](http://x/y) [b](c)"
    assert for_streamlit("![a][b]\n\n[b]: http://x") == "\\![a][b]\n\n[b]: http://x"
    assert for_streamlit("[![a](http://x)](y)") == r"[\![a](http://x)](y)"


def test_breaks_are_kept_where_somebody_typed_them() -> None:
    assert for_streamlit("a\nb\n\nc", keep_breaks=True) == "a  \nb\n\nc"
    assert for_streamlit("a\nb") == "a\nb"


@pytest.mark.parametrize("size", range(120))
def test_what_has_come_so_far_can_be_shown(size: int) -> None:
    text = "Let \\( x \\) be\n\n\\[ x^2 \\]\n\n```python\nprint('\\(x\\)')\n```\n"
    text += "- `a` and $b$ for $5 ![p](u) $$c$$ \\[d\\]"
    assert "print('\\(x\\)')" in for_streamlit(text)
    assert isinstance(for_streamlit(text[:size]), str)


def test_thoughts_are_split_off() -> None:
    assert split_thoughts("<think>\nhm\n</think>\n\nyes") == ("hm", "yes")
    assert split_thoughts("<think>hm") == ("hm", "")
    assert split_thoughts("no <think>x</think>") == ("", "no <think>x</think>")


def test_a_block_of_code_holds_any_text() -> None:
    assert fenced("a", "json") == "```json\na\n```"
    assert fenced("```\na\n```") == "````\n```\na\n```\n````"


def test_plain_text_holds_no_markup() -> None:
    assert plain("a_b *c* $5 [d](e) :red[f]") == r"a\_b \*c\* \$5 \[d\]\(e\) \:red\[f\]"
    assert plain("你好 b") == "你好 b"
