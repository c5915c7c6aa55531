"""Files that a verb is asked to write: looked at before the work, so that none is done in vain."""

from pathlib import Path

from ternlm.config.section import ConfigError


def check_writable(option: str, file: Path) -> None:
    """Raise ConfigError where a file can't be written; one that wasn't there isn't there afterwards."""
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{option} = {file} must lie in a folder that exists; make {file.parent} or choose another")
    try:
        existed = file.exists()
        file.open("a").close()
        if not existed:
            file.unlink(missing_ok=True)  # as another rank may have
    except OSError as error:
        raise ConfigError(f"{option} = {file} can't be written ({error.strerror}); choose another file") from error
