"""The page's words in its languages, as words.toml has them; and mistakes that are told in the reader's language."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files


class Mistake(ValueError):
    """What a user can put right: a name of words.toml, and what stands in its gaps."""

    def __init__(self, name: str, /, **values: object) -> None:
        super().__init__(f"{name} {values}" if values else name)
        self.name, self.values = name, values


@dataclass(frozen=True)
class Words:
    """The words of one language."""

    language: str
    texts: Mapping[str, str]

    def __call__(self, name: str, /, **values: object) -> str:
        """Return a text with its gaps filled."""
        return self.texts[name].format(**values)

    def of(self, mistake: Mistake) -> str:
        """Tell a mistake."""
        return self(mistake.name, **mistake.values)


def load_words() -> dict[str, Words]:
    """Return the words of each language by its code."""
    tables = tomllib.loads(files("ternlm.web").joinpath("words.toml").read_text("utf-8"))
    return {language: Words(language, texts) for language, texts in tables.items()}
