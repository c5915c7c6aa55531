"""The tensors of a Hugging Face folder by their own names: safetensors files, or PyTorch's older .bin files.

.bin files are pickles: no code in them is run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ternlm.convert.torch_files import load_tensors
from ternlm.convert.weights import ConvertError, Weights, cut


def open_files(folder: Path) -> Weights:
    """Return the tensors of a folder, from its safetensors files if it has any; raises ConvertError.

    Where an index names the files, only those are read; else one whole file, or all that there are. Meta's and
    Mistral's own files (consolidated*), which some folders hold beside, have other names and orders: left alone.
    """
    found = _named(folder, "model.safetensors", "model*.safetensors", "*.safetensors")
    if found:
        return _Safetensors(folder, found)
    found = _named(folder, "pytorch_model.bin", "pytorch_model*.bin")
    if found:
        return _Pickles(folder, found)
    others = sorted(path.name for path in folder.glob("consolidated*"))
    if others:
        raise ConvertError(
            f"{folder}: of weights it holds {', '.join(others)} alone, which is not Hugging Face's format; fetch the "
            "model's *.safetensors, too"
        )
    raise ConvertError(f"{folder}: holds neither *.safetensors nor pytorch_model*.bin; fetch the model's weights")


def _named(folder: Path, whole: str, *patterns: str) -> list[Path]:
    """Return the files that the index names, or the whole one, or all of the first pattern that there are any of."""
    if (folder / f"{whole}.index.json").is_file():
        return sorted({folder / Path(name).name for name in _index(folder, whole).values()})
    if (folder / whole).is_file():
        return [folder / whole]
    found = ([path for path in sorted(folder.glob(each)) if not _is_other(path)] for each in patterns)
    return next((files for files in found if files), [])


def _is_other(path: Path) -> bool:
    return path.name.startswith(("consolidated", "adapter_model"))


def _index(folder: Path, whole: str) -> dict[str, str]:
    """Return which file each tensor is in, as the index says."""
    path = folder / f"{whole}.index.json"
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ConvertError(f"{path}: has no weight_map of names to files; fetch it again")
    missing = sorted({name for name in named.values() if not (folder / Path(name).name).is_file()})
    if missing:
        raise ConvertError(f"{path}: names {', '.join(missing)}, which isn't there; fetch it")
    return named


class _Safetensors:
    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118  # not a dictionary
                    part = file.get_slice(name)
                    if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                        raise ConvertError(
                            f"{path}: {name} is {part.get_dtype()}; only plain float weights can be read"
                        )
                    self._files[name] = path
                    self._shapes[name] = tuple(part.get_shape())
        _check_index(folder, "model.safetensors", self._files)

    def names(self) -> Sequence[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        with _opened(self._files[name]) as file:
            if offset is None or shape is None:
                return file.get_tensor(name)
            part = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
            return file.get_slice(name)[part]


class _Pickles:
    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        found = [(path, load_tensors(path)) for path in files]
        self._tensors = {name: tensor for _, tensors in found for name, tensor in tensors.items()}
        _check_index(folder, "pytorch_model.bin", {name: path for path, tensors in found for name in tensors})

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        return cut(self._tensors[name], offset, shape).clone()  # the file stays mapped, not its part


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as trouble:
        raise ConvertError(f"{path}: can't be read ({_first_line(trouble)}); fetch it again") from trouble


def _check_index(folder: Path, whole: str, found: Mapping[str, Path]) -> None:
    """Refuse a folder whose files hold something else than its index says."""
    if not (folder / f"{whole}.index.json").is_file():
        return
    for name, file in _index(folder, whole).items():
        if name not in found or found[name].name != Path(file).name:
            raise ConvertError(
                f"{folder / whole}.index.json: says that {name} is in {file}, and it isn't; the files are of different "
                "models: fetch all of them again"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises ConvertError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as trouble:
        raise ConvertError(f"{path}: can't be read ({_first_line(trouble)}); fetch it again") from trouble
    if not isinstance(content, dict):
        raise ConvertError(f"{path}: must hold a JSON object, not {type(content).__name__}; fetch it again")
    return content


def _first_line(trouble: BaseException) -> str:
    return (str(trouble).strip().splitlines() or [type(trouble).__name__])[0]
