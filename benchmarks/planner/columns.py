"""The columns of a CSV of published runs, and its lines, checked before anything is computed from them.

benchmarks/planner/README.md shows the columns to people; a test holds the two together. rows.py says what a row means.
"""

import csv
import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ternlm.config.section import ConfigError
from ternlm.planner.known import sheets

SHEETS = {"a100-80gb": "a100", "a100-40gb": "a100-40", "a800-80gb": "a800", "h100-80gb": "h100"}
SHEETS |= {"h100-96gb-500w": "h100-96-500w", "h100-80gb-500w": "h100-500w", "h100-96gb": "h100-96"}
SHEETS |= {"h800-80gb": "h800", "h200-141gb": "h200", "b200-180gb": "b200", "b200-192gb": "b200"}

Check = Callable[[str], str]
"""Returns what is wrong with a value and what would be right, or nothing."""


@dataclass(frozen=True)
class Column:
    """One column. `blank`: what an empty value means; without it, a value is needed."""

    check: Check
    meaning: str
    blank: str = ""


def _text(value: str) -> str:
    return ""


def _count(value: str) -> str:
    number = _float(value)
    return "" if number >= 1 and number == int(number) else "must be a whole number of at least 1; write such a one"


def _positive(value: str) -> str:
    return "" if _float(value) > 0 else "must be a number above 0; write such a one"


def _float(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        return -1.0
    return number if math.isfinite(number) else -1.0


def _one_of(*known: str) -> Check:
    def check(value: str) -> str:
        return "" if value in known else f"must be one of {', '.join(known)}; write the nearest of them"

    return check


def _device(value: str) -> str:
    names = [*SHEETS, *sheets()]
    if value.lower() in names:
        return ""
    near = difflib.get_close_matches(value.lower(), names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"must be a known device; {hint}write one of {', '.join(SHEETS)}, or add its sheet to known.toml"


# Attention kernels of other names have no constants of their own: they are taken for FlashAttention 2.
ATTENTION = ("flash1", "flash2", "flash3", "cudnn", "sdpa", "triton")

COLUMNS: dict[str, Column] = {
    "id": Column(_text, "names the row in the report"),
    "source": Column(_text, "who published it; rows of one source are left out together"),
    "model": Column(_text, "name of the model; MPT models have ALiBi"),
    "hidden_size": Column(_count, "as in the settings, likewise the next four"),
    "num_layers": Column(_count, "blocks"),
    "num_heads": Column(_count, "query heads"),
    "num_kv_heads": Column(_count, "key and value heads", "num_heads"),
    "intermediate_size": Column(_count, "width of the MLP"),
    "gated_mlp": Column(_one_of("0", "1"), "1: three matrices, 0: two"),
    "vocab_size": Column(_count, "rows of the embedding"),
    "tied": Column(_one_of("0", "1"), "1: the head is the embedding", "0"),
    "gpu": Column(_device, f"device: {', '.join(SHEETS)}"),
    "gpus_per_node": Column(_count, "devices that the fast links join", "8"),
    "inter_node_gbit_per_node": Column(_positive, "network of a node, each way, Gb/s", "the device's data sheet"),
    "n_gpus": Column(_count, "all devices"),
    "seq_len": Column(_count, "tokens of a sequence, which attention spans"),
    "micro_batch_sequences": Column(_count, "sequences of a device's microbatch", "from the note, else 2"),
    "gradient_accumulation": Column(_count, "microbatches of a step", "from the note, else 1"),
    "precision": Column(_one_of("bf16", "fp16", "fp8"), "number format of the blocks' products"),
    "tensor": Column(_count, "degree of tensor parallelism", "1"),
    "pipeline": Column(_count, "degree of pipeline parallelism", "1"),
    "virtual_stages": Column(_count, "stages of a pipeline rank", "1"),
    "context": Column(_count, "degree of context parallelism", "1"),
    "shard_params": Column(_count, "data ranks over which weights are cut", "1"),
    "shard_grads": Column(_count, "data ranks over which gradients are cut", "1"),
    "shard_optimizer": Column(_count, "data ranks over which optimizer states are cut", "1"),
    "recompute": Column(_one_of("none", "selective", "full"), "what runs again in backward"),
    "compiled": Column(_one_of("0", "1"), "1: torch.compile or XLA"),
    "attention": Column(_one_of(*ATTENTION), "kernel; all but flash1 are taken for FlashAttention 2"),
    "tokens_per_s_per_gpu": Column(_positive, "published speed of one device", "not published"),
    "peak_memory_gib": Column(_positive, "published peak memory of one device, GiB", "not published"),
    "note": Column(_text, "free text; `global batch N`, `async TP`, `SHARD_GRAD_OP` are understood", "nothing"),
}


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each line of a CSV with where it stands (`FILE:LINE`), its values stripped of blanks.

    Raises ConfigError that names file, line, column, value, rule and remedy; further columns are ignored.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); name a CSV file of published runs") from error
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        near = difflib.get_close_matches(missing[0], reader.fieldnames or (), n=1)
        hint = f" (is {near[0]!r} it?)" if near else ""
        raise ConfigError(
            f"{path.name}:1: no column {', '.join(missing)}{hint}; all that benchmarks/planner/README.md lists must be "
            "there: add it to the header, with empty values where nothing is known"
        )
    ids: dict[str, int] = {}
    for line in reader:
        where = f"{path.name}:{reader.line_num}"
        values = {name: (line[name] or "").strip() for name in COLUMNS}
        for name, value in values.items():
            _check(where, name, value)
        if values["id"] in ids:
            raise ConfigError(
                f"{where}: id = {values['id']!r} must be the only one of its name, and is also in line "
                f"{ids[values['id']]}; write another"
            )
        ids[values["id"]] = reader.line_num
        yield where, values
    if not ids:
        raise ConfigError(f"{path}: has no rows under its header; add published runs, one a line")


def _check(where: str, name: str, value: str) -> None:
    column = COLUMNS[name]
    wrong = column.check(value) if value or column.blank else "must not be empty; write its value"
    if wrong and (value or not column.blank):
        raise ConfigError(f"{where}: {name} = {value!r} {wrong}")
