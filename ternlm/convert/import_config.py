"""A configuration of the ancestor (a Python file such as `configs/7B_sft.py`) as a recipe of ours.

The file is read (`python_values`), never run. What it says is mapped section by section; what has no counterpart is
listed with what happens instead (`config_settings`).
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from ternlm.config.load import config_from_dict
from ternlm.config.section import ConfigError
from ternlm.convert.config_settings import Settings, show
from ternlm.convert.python_values import read_values
from ternlm.convert.weights import ConvertError

_MOST_BYTES = 1 << 20
_DTYPES = {
    "float16": "float16", "half": "float16", "bfloat16": "bfloat16", "float32": "float32", "float": "float32",
    "tf32": "float32",
}  # fmt: skip
_SHARDED = {"none": False, "mtp": False, "msp": True, "fsp": True}  # modes of tensor parallelism: along the sequence?

Table = dict[str, Any]


def import_config(path: Path, data_ranks: int = 1) -> tuple[str, list[str]]:
    """Return the recipe, as TOML, and the settings without a counterpart, each with what happens instead.

    data_ranks: data-parallel ranks of the ancestor's run (devices / (tensor x pipeline)); its batch grew with them.
    Raises ConvertError for a value that only running the file would tell, and for a model that isn't ours.
    """
    if data_ranks < 1:
        raise ConvertError(f"data_ranks = {data_ranks} must be 1 or more")
    read = read_values(_read_text(path), str(path))
    if read.problems:
        raise ConvertError("\n".join(read.problems))
    settings = Settings(read.values, read.used, str(path))
    job = settings.take("JOB_NAME", str) or path.stem
    top, tables = _map(settings, read.values, job, data_ranks)
    settings.left_over()
    text = _write(f"{job}, from {path.name}", _notes(tables, data_ranks), top, tables)
    try:
        config_from_dict(tomllib.loads(text))
    except ConfigError as trouble:
        raise ConvertError(f"{path}: what it says makes no recipe: {trouble}") from trouble
    return text, settings.notes


def write_recipe(recipe: str, out: Path) -> None:
    """Write a recipe's text to a new file."""
    if out.exists():
        raise ConvertError(f"{out}: exists; choose another name, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(recipe, encoding="utf-8")


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConvertError(f"{path}: is a folder; give the configuration's file, which ends in .py")
    if not path.is_file():
        raise ConvertError(f"{path}: no such file; give the configuration's path")
    if path.stat().st_size > _MOST_BYTES:
        raise ConvertError(f"{path}: is larger than 1 MiB; is it a configuration?")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as trouble:
        raise ConvertError(f"{path}: not UTF-8 text at byte {trouble.start}; save it as UTF-8") from trouble


def _map(settings: Settings, values: Table, job: str, data_ranks: int) -> tuple[Table, dict[str, Table]]:
    """Return the settings of the top level and of each section."""
    length = values.get("SEQ_LEN")
    seq_len = settings.positive("data.seq_len", length if isinstance(length, int) and length > 0 else None)
    tables: dict[str, Table] = {}
    tables["model"] = _map_model(settings, seq_len)
    tables["data"] = _map_data(settings, seq_len)
    tables["batch"] = _map_batch(settings, data_ranks)
    steps = settings.positive("data.total_steps")
    tables["train"] = {"steps": steps, "stop_file": _local(settings, "ckpt.stop_file_path")}
    tables["optimizer"] = _map_optimizer(settings)
    tables["schedule"] = _map_schedule(settings, steps, tables["optimizer"]["lr"])
    tables["loss"] = {"label_smoothing": settings.take("loss.label_smoothing", float)}
    tables["compute"] = _map_compute(settings)
    tables["parallel"], tables["sharding"] = _map_parallel(settings, data_ranks)
    tables["checkpoint"] = _map_checkpoint(settings)
    tables["monitor"] = {"tensorboard": settings.take("enable_tb", bool)}
    tables["validation"] = _map_validation(settings, tables["data"])
    tables["load"] = _map_load(settings)
    out = _local(settings, "ckpt.save_ckpt_folder") or f"runs/{job}"
    return {"out": out, "seed": 1024}, tables


def _map_model(settings: Settings, seq_len: int) -> Table:
    kinds = {
        "model_type": ("INTERNLM", "another model"),
        "model.norm_type": ("rmsnorm", "other norms"),
        "model.use_swiglu": (True, "another MLP"),
        "model.is_reward": (False, "a reward model"),
    }
    for name, (known, what) in kinds.items():
        value = settings.take_any(name)
        if value is not None and value != known:
            raise ConvertError(
                f"{settings.origin}: {name} = {show(value)} is {what}, which a recipe can't say; import_config knows "
                f"{name} = {show(known)}"
            )
    hidden = settings.positive("model.hidden_size")
    dynamic = settings.take("model.use_dynamic_ntk_rope", bool, False)
    longest = settings.positive("model.max_position_embeddings", 2048 if dynamic else seq_len)
    ratio = settings.take("model.mlp_ratio", float, 4.0)
    width = int(hidden * ratio) if 0 < ratio < 1e6 else 0
    return {
        "vocab_size": settings.positive("model.vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": settings.positive("model.num_layers"),
        "num_attention_heads": settings.positive("model.num_attention_heads"),
        "intermediate_size": -(-width // 256) * 256,  # as the ancestor rounded it
        "attention_bias": True,
        "rms_norm_eps": settings.take("model.layer_norm_epsilon", float, 1e-5),
        "rope_theta": settings.take("model.rope_base", float),
        "rope_scaling": {"kind": "dynamic"} if dynamic else None,
        "max_position_embeddings": longest if dynamic else max(longest, seq_len),
    }


def _map_data(settings: Settings, seq_len: int) -> Table:
    folder = _local(settings, "data.train_folder")
    if folder is None and not settings.noted("data.train_folder"):
        settings.note("data.train_folder", None, "random data has no counterpart; give data.sources.0.path")
    folder = folder or "data/train"
    source: Table = {"name": _name_of(folder), "path": folder}
    if shortest := settings.take("data.min_length", int, 0):
        source["min_length"] = shortest
    across = settings.take("data.pack_sample_into_one", bool, False)
    packed = settings.take("data.use_packed_dataset", bool, True)
    if settings.take("model.use_flash_attn", bool, True):
        packing = "pad" if not packed else "across" if across else "documents"
    else:
        packing = "pad"
    return {
        "seq_len": seq_len,
        "packing": packing,
        "sources": [source],
        "validation": None,
        "skip_steps": _shift(settings, "data.skip_batches"),
        "workers": settings.take("data.num_worker", int) or None,
    }


def _shift(settings: Settings, name: str) -> str | None:
    """Return ranges of batches, which the ancestor counted from 0, as ranges of steps, counted from 1."""
    text = settings.take(name, str, "").replace(" ", "")
    if text and not re.fullmatch(r"\d{1,15}(-\d{1,15})?(,\d{1,15}(-\d{1,15})?)*", text):
        raise ConvertError(f"{settings.origin}: {name} = {show(text)} must be ranges such as '100-200,512'; correct it")
    return re.sub(r"\d+", lambda number: str(int(number[0]) + 1), text) or None


def _map_batch(settings: Settings, data_ranks: int) -> Table:
    micro_num = settings.positive("data.micro_num", 1)
    micro_bsz = settings.positive("data.micro_bsz")
    unit = micro_bsz * data_ranks
    batch: Table = {"global_sequences": micro_num * unit, "microbatch_sequences": micro_bsz, "rampup": None}
    rampup = settings.take("data.rampup_batch_size", str, "").split()
    if rampup:
        if len(rampup) != 3 or not all(word.isdecimal() and int(word[:15]) for word in rampup):
            raise ConvertError(
                f"{settings.origin}: data.rampup_batch_size = {show(' '.join(rampup))} must be three numbers, such as "
                "'192 24 8'; correct it"
            )
        start, increment, every = (int(word[:15]) for word in rampup)
        if start < micro_num:
            batch["rampup"] = {"start": start * unit, "increment": increment * unit, "every": every}
    return batch


def _map_optimizer(settings: Settings) -> Table:
    beta1, beta2 = settings.take("adam.adam_beta1", float, 0.9), settings.take("adam.adam_beta2", float, 0.95)
    return {
        "lr": settings.take("adam.lr", float, 1e-4),
        "betas": [beta1, settings.take("beta2_scheduler.init_beta2", float, beta2)],
        "beta2_ramp": max(settings.take("beta2_scheduler.c", float, 0.0), 0.0) or None,
        "eps": settings.take("adam.adam_eps", float, 1e-8),
        "weight_decay": settings.take("adam.weight_decay", float, 0.01),
        "decay_all": True,  # the ancestor had one group of parameters
        "clip_norm": settings.take("hybrid_zero_optimizer.clip_grad_norm", float),
    }


def _map_schedule(settings: Settings, steps: int, lr: float) -> Table:
    total = settings.take("lr_scheduler.total_steps", int, steps)
    if total != steps:
        settings.note("lr_scheduler.total_steps", total, f"the schedule ends with train.steps = {steps}")
    lowest = settings.take("lr_scheduler.eta_min", float, 1e-5)
    share = float(f"{lowest / lr:.12g}") if lr > 0 else 0.0
    if share > 1:
        settings.note("lr_scheduler.eta_min", lowest, f"the learning rate doesn't rise above adam.lr = {lr}")
    warmup = settings.take("lr_scheduler.warmup_ratio", float, 0.01)
    return {"kind": "cosine", "warmup_fraction": warmup, "min_lr": min(share, 1.0)}


def _map_compute(settings: Settings) -> Table:
    given = settings.take("model.dtype", str, "torch.float16")
    dtype = _DTYPES.get(given.removeprefix("torch."))
    if dtype is None:
        raise ConvertError(f"{settings.origin}: model.dtype = {show(given)} must be one of {', '.join(_DTYPES)}")
    if given.endswith("tf32"):
        settings.note("model.dtype", given, "float32 throughout; TF32 isn't switched on")
    share = settings.take_any("model.checkpoint")
    if not isinstance(share, int | float | None) or not 0 <= (share or 0) <= 1:
        raise ConvertError(f"{settings.origin}: model.checkpoint = {show(share)} must be True, False or a share of 1")
    return {"dtype": dtype, "recompute": float(share) if share else None}


def _map_parallel(settings: Settings, data_ranks: int) -> tuple[Table, Table]:
    tensor, mode = settings.positive("parallel.tensor.size", 1), settings.take("parallel.tensor.mode", str, "none")
    tensor = settings.positive("parallel.tensor", tensor)
    if mode not in _SHARDED:
        settings.note(
            "parallel.tensor.mode", mode, "matrices are shared out by rows and columns, along the sequence too"
        )
    along = settings.take("parallel.sequence_parallel", bool, False) or _SHARDED.get(mode, True)
    pipeline = settings.positive("parallel.pipeline", settings.positive("parallel.pipeline.size", 1))
    chunks = settings.positive("model.num_chunks", 1)
    parallel: Table = {"pipeline": pipeline, "tensor": tensor}
    if tensor > 1:
        parallel["sequence"] = along
    if pipeline > 1:
        parallel |= {"pipeline_schedule": "interleaved", "stages_per_rank": chunks} if chunks > 1 else {}
    elif chunks > 1:
        settings.note("model.num_chunks", chunks, "without effect at pipeline = 1")
    size = settings.take("parallel.zero1", int, settings.take("parallel.zero1.size", int, -1))
    size = -1 if size <= 0 else size
    if size > data_ranks:
        settings.note(
            "parallel.zero1", size, f"kept, and needs {size} data ranks or more; the batch was made for {data_ranks}"
        )
    if settings.take("parallel.zero1.fsdp", bool, False):
        return parallel, {"params": size, "grads": size, "optimizer": size}
    return parallel, {"params": 1, "grads": 1, "optimizer": size}


def _map_checkpoint(settings: Settings) -> Table:
    saves = settings.take("ckpt.enable_save_ckpt", bool, True)
    every = settings.take("ckpt.checkpoint_every", int)
    snapshots = settings.take("ckpt.oss_snapshot_freq", float, float("inf"))
    waits = settings.take("ckpt.async_upload", bool)
    if not saves:
        settings.note("ckpt.enable_save_ckpt", False, "a checkpoint is written at the end all the same")
        return {"every_steps": 0}
    if not every or every < 0:
        raise ConvertError(f"{settings.origin}: ckpt.checkpoint_every = {every} must be above 0; correct it")
    table: Table = {"every_steps": every, "keep_last": 2, "keep_every_steps": every}
    if 0 < snapshots < every:
        if snapshots == int(snapshots) and every % int(snapshots) == 0:
            table["every_steps"] = int(snapshots)  # the newest two of these stay, as two snapshots did
        else:
            settings.note("ckpt.oss_snapshot_freq", snapshots, "no snapshots; choose a divisor of checkpoint_every")
    if waits is not None:
        table["wait"] = not waits
    return table


def _map_validation(settings: Settings, data: Table) -> Table:
    folder, every = _local(settings, "data.valid_folder"), settings.take("data.valid_every", int, 0)
    if folder is not None:
        data["validation"] = [{"name": _name_of(folder), "path": folder}]
        return {"every_steps": max(every, 0), "max_sequences": 0}
    if every > 0:
        settings.note("data.valid_every", every, "there is no data for it; set data.validation_fraction and validation")
    return {}


def _map_load(settings: Settings) -> Table:
    names = ("ckpt.load_ckpt_info.path", "ckpt.load_model_only_folder", "ckpt.load_ckpt_folder")
    found = [path for name in names if (path := _local(settings, name)) is not None]
    content = settings.take_any("ckpt.load_ckpt_info.content")
    if (info := settings.take_any("ckpt.load_ckpt_info")) is not None:
        settings.note("ckpt.load_ckpt_info", info, "isn't dict(path=..., content=...); set load.from")
    parts = [content] if isinstance(content, str) else list(content) if isinstance(content, list | tuple) else []
    if found and any(part != "model" for part in parts):
        settings.note("ckpt.load_ckpt_info.content", content, "weights alone are taken over; all else starts anew")
    return {"from": found[0] if found else None}


def _local(settings: Settings, name: str) -> str | None:
    """Return a path on disks of this machine, without the ancestor's prefix."""
    path = settings.take(name, str) or None
    if path is None:
        return None
    prefix = re.match(r"(local|boto3|s3|oss2|volc|ali):", path)
    if prefix and prefix[1] != "local":
        settings.note(name, path, "paths are on disks here; mount the storage, or copy from and to it")
        return None
    return path.removeprefix("local:")


def _name_of(folder: str) -> str:
    """Return the name of a source: the last part of its path."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.rstrip("/").rpartition("/")[2]).strip(".")
    return name if name and name != "total" else "data"


def _notes(tables: dict[str, Table], data_ranks: int) -> list[str]:
    """Return what a reader of the recipe needs to know of its numbers."""
    batch, parallel = tables["batch"], tables["parallel"]
    whole, micro = batch["global_sequences"], batch["microbatch_sequences"]
    ranks = data_ranks * parallel["tensor"] * parallel["pipeline"]
    return [
        f"Batch: micro_num {whole // (micro * data_ranks)} x micro_bsz {micro} x {data_ranks} data-parallel "
        f"rank{'' if data_ranks == 1 else 's'} = {whole} sequences a step, on any number of ranks.",
        f"As there: {ranks} rank{'' if ranks == 1 else 's'} = data {data_ranks} x pipeline {parallel['pipeline']} x "
        f"tensor {parallel['tensor']}.",
    ]


_BESIDE = {
    ("data", "sources"): "one for each folder of a type (en, cn, code) gives metrics of each",
    ("load", "from"): "first `tern import` this folder, with --out DIR, and write DIR here",
}


def _write(title: str, notes: list[str], top: Table, tables: dict[str, Table]) -> str:
    """Return a recipe's text; settings that are None, and sections without any, are left out."""
    lines = [f"# {_one_line(title)}", "#", *(f"# {note}" for note in notes), ""]
    lines += [f"{key} = {_toml(value)}" for key, value in top.items()]
    for section, table in tables.items():
        given = {key: value for key, value in table.items() if value is not None}
        if given:
            lines += ["", f"[{section}]"]
        for key, value in given.items():
            beside = _BESIDE.get((section, key))
            lines += [f"# {beside}"] if beside else []
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:200]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):  # TOML's escapes are JSON's, but for the DEL character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return f"[{', '.join(map(_toml, value))}]"
