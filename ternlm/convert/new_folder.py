"""Write a folder for other programs whole, or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ternlm.convert.weights import ConvertError
from ternlm.data.atomic import publish, sync


def check_new(out: Path) -> None:
    """Raise ConvertError where there is anything at `out` but an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConvertError(f"{out}: exists already; choose another folder, or remove it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `out` when everything in it is on the disk; a failure leaves nothing.

    Raises ConvertError where `out` exists.
    """
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors writes files for the owner alone
            sync(path)
        folder.chmod(0o755)
        sync(folder)
        publish(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
