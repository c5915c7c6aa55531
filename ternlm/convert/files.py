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
    """Return the tensors of a folder, from its safetensors files if it has any; raises ConvertError."""
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return _Safetensors(folder, found)
    found = sorted(folder.glob("pytorch_model*.bin"))
    if found:
        return _Pickles(folder, found)
    raise ConvertError(f"{folder}: holds neither *.safetensors nor pytorch_model*.bin; fetch the model's weights")


class _Safetensors:
    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118  # not a dictionary
                    self._files[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
        _check_index(folder / "model.safetensors.index.json", self._files)

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
        self._tensors = {name: tensor for path in files for name, tensor in load_tensors(path).items()}
        _check_index(folder / "pytorch_model.bin.index.json", self._tensors)

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


def _check_index(path: Path, found: Mapping[str, object]) -> None:
    """Refuse a folder in which files are missing that its index names."""
    if not path.is_file():
        return
    named = read_json(path).get("weight_map", {})
    missing = sorted({file for name, file in named.items() if name not in found})
    if missing:
        raise ConvertError(f"{path}: names {', '.join(missing)}, which isn't there or is another file; fetch it again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises ConvertError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as trouble:
        raise ConvertError(f"{path}: can't be read ({_first_line(trouble)}); fetch it again") from trouble
    if not isinstance(content, dict):
        raise ConvertError(f"{path}: must hold a JSON object, not {type(content).__name__}; fetch it again")
    return content


def _first_line(trouble: BaseException) -> str:
    return (str(trouble).strip().splitlines() or [type(trouble).__name__])[0]
