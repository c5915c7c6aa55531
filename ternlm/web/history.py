"""Conversations in a folder, a file each. A file is whole or absent; one that can't be read is left alone and named."""

import contextlib
import json
import os
import re
from pathlib import Path

from ternlm.web.talk import Talk, as_data, from_data

_ID = re.compile(r"[0-9a-f]{8,64}")


class History:
    """A folder of conversations."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError where the folder can't be made."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def load(self) -> tuple[list[Talk], list[str]]:
        """Return the conversations, and the names of files that hold none."""
        talks, others = [], []
        for file in sorted(self._folder.glob("*.json")):
            try:
                talk = from_data(json.loads(file.read_text("utf-8")))
                if talk.id != file.stem or not _ID.fullmatch(talk.id):
                    raise ValueError(f"it is called {talk.id}")
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                others.append(file.name)
            else:
                talks.append(talk)
        return talks, others

    def save(self, talk: Talk) -> None:
        """Write a conversation. Raises OSError."""
        path = self._folder / f"{talk.id}.json"
        temporary = self._folder / f".{talk.id}.tmp-{os.getpid()}"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(json.dumps(as_data(talk), ensure_ascii=False, indent=1))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def remove(self, talk: Talk) -> None:
        """Forget a conversation. Raises OSError."""
        (self._folder / f"{talk.id}.json").unlink(missing_ok=True)
