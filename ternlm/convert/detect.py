"""Tell what a path holds by what lies there, and open it as a model."""

from pathlib import Path

from ternlm.convert.huggingface import open_hf
from ternlm.convert.weights import ConvertError, OpenModel


def is_foreign(path: Path) -> bool:
    """Whether this looks like a model of another format: a Hugging Face folder, a GGUF file, an ancestor's folder."""
    return path.suffix == ".gguf" or (path / "config.json").is_file() or any(path.glob("model_tp*_pp*.pt"))


def open_foreign(path: Path) -> OpenModel:
    """Open a model of another format; raises ConvertError where it isn't one, or can't be used."""
    if not path.exists():
        raise ConvertError(f"{path}: no such file or folder; give a model's folder or a .gguf file")
    if (path / "config.json").is_file():
        return open_hf(path)
    raise ConvertError(
        f"{path}: holds no model that can be read: no config.json of Hugging Face's; give the folder that has it"
    )
