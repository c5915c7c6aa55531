"""Open a model wherever it comes from: a run, one of its checkpoints, or another format; and import the latter."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ternlm
from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import find_checkpoint
from ternlm.checkpoint.load import check_model, check_same_model, read_model_config, read_state
from ternlm.checkpoint.weights import CheckpointWeights, write_weights
from ternlm.config import ComputeConfig
from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError
from ternlm.convert.detect import find_model, is_foreign, open_foreign
from ternlm.convert.fill import fill_model
from ternlm.convert.internlm import Norms
from ternlm.convert.peft import Adapter, is_adapter, read_adapter, with_adapter
from ternlm.convert.weights import ConvertError, OpenModel, Weights
from ternlm.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from ternlm.model.decoder import CausalLM, build_empty_model
from ternlm.parallel.pieces import Piece
from ternlm.train.adapters import adapter_in, find_base, fingerprint_of
from ternlm.train.precision import autocast, choose_device, choose_dtype

logger = logging.getLogger(__name__)


def open_model(model: str | Path, base: str | Path | None = None) -> OpenModel:
    """Open a run's newest checkpoint, a checkpoint, or a model of another format, as `find_model` finds it.

    Adapters are put into the model that they belong to: `base`, or the one that they name. Raises CheckpointError or
    ConvertError, which say what to do.
    """
    path = find_model(model)
    if is_adapter(path):
        return _open_adapter(path, base)
    if is_foreign(path):
        _refuse_base(path, base)
        return open_foreign(path)
    folder = find_checkpoint(path)
    state = read_state(folder)
    tokenizer = load_tokenizer(folder) if (folder / TOKENIZER_FILE).is_file() else None
    facts = dict(state.get("facts", {})) | {"training": _training(state)}
    opened = OpenModel(folder, read_model_config(folder), CheckpointWeights(folder), tokenizer, facts)
    adapter = adapter_in(opened.weights, state)
    if adapter:
        return _on_its_base(opened, adapter, state["adapter"], base)
    _refuse_base(folder, base)
    return opened


def _refuse_base(path: Path, base: str | Path | None) -> None:
    if base is not None:
        raise ConfigError(f"--base {base} has no effect: {path} holds a whole model, no adapters; leave it out")


def _on_its_base(opened: OpenModel, adapter: Adapter, described: dict[str, Any], base: str | Path | None) -> OpenModel:
    """Return the model that a checkpoint's adapter makes of the one that it belongs to."""
    path = find_model(base) if base else find_base(opened.path, described)
    theirs = open_model(path)
    if fingerprint_of(theirs.weights) != described["fingerprint"]:
        raise CheckpointError(
            f"{opened.path}: its adapters belong to {described['base']} as it was, and {path} has other weights; "
            "name the model that the run began with: --base MODEL"
        )
    merged = with_adapter(theirs, adapter, opened.path)
    return replace(
        merged, path=opened.path, tokenizer=opened.tokenizer or theirs.tokenizer, facts={**theirs.facts, **opened.facts}
    )


def _open_adapter(path: Path, base: str | Path | None) -> OpenModel:
    """Open an adapter in PEFT's format as the model that it makes."""
    adapter = read_adapter(path)
    named = base or adapter.base
    if not named:
        raise ConvertError(f"{path}: doesn't name the model that it belongs to; name it: --base MODEL")
    try:
        model = open_model(named)
    except ConvertError as trouble:
        if base:
            raise
        raise ConvertError(f"{path}: names {named} as its model: {trouble}; or name it: --base MODEL") from trouble
    return replace(with_adapter(model, adapter, path), path=path)


def open_adapter(model: str | Path) -> Adapter:
    """Read the adapter of a run, a checkpoint or a folder of PEFT's; raises ConfigError where there is none."""
    path = find_model(model)
    if is_adapter(path):
        return read_adapter(path)
    if not is_foreign(path):
        folder = find_checkpoint(path)
        adapter = adapter_in(CheckpointWeights(folder), read_state(folder))
        if adapter is not None:
            return adapter
    raise ConfigError(f"{path}: holds a whole model, no adapters; give a run that trained some, or PEFT's folder")


@contextmanager
def loaded(
    name: str, device: str = "auto", dtype: str = "auto", base: str | None = None
) -> Iterator[tuple[OpenModel, CausalLM]]:
    """Open a model by path or name and put its weights on a device, to be run, not trained, inside this context.

    All but the norms have the dtype that is computed with. device, dtype: as `compute.device` and `compute.dtype`.
    base: as for `open_model`. Raises ConfigError where the model has no tokenizer, before its weights are read.
    """
    opened = open_model(name, base)
    if opened.tokenizer is None:
        raise ConfigError(f"{name}: has no tokenizer, without which a prompt can't be read; put a tokenizer.json there")
    place = choose_device(device)
    kept = choose_dtype(ComputeConfig.model_validate({"dtype": dtype}), place)
    model = build_empty_model(opened.config, place, lambda empty: _narrow(empty, kept))
    fill_model(model, opened.weights)
    with autocast(place, kept):
        yield opened, model


def _narrow(model: CausalLM, dtype: torch.dtype) -> None:
    """Keep the matrices in `dtype`."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.to(dtype)


def import_model(
    source: str | Path, out: Path, tokenizer: Path | None = None, heads: int | None = None, norms: Norms = "equal"
) -> OpenModel:
    """Write a model of another format as a checkpoint that `load.from` and `tern generate` take; return it.

    source: as for `find_model`. tokenizer: where the source has none, or another one is wanted. heads, norms: as for
    `open_internlm`.
    """
    model = open_foreign(find_model(source), heads, norms)
    if tokenizer is not None:
        model = _with_tokenizer(model, load_tokenizer(tokenizer), tokenizer)
    state = {
        "format": 1,
        "model": model.config.model_dump(mode="json", exclude_none=True),
        "tokenizer": {"fingerprint": model.tokenizer.fingerprint if model.tokenizer else None},
        "facts": {name: model.facts[name] for name in ("source", "generation", "chat_template") if name in model.facts},
        "versions": {"ternlm": ternlm.__version__, "torch": torch.__version__},
    }
    own = model.tokenizer
    write_weights(out, model.weights, state, lambda folder: own.save(folder) if own else None)
    return model


def _with_tokenizer(model: OpenModel, tokenizer: Tokenizer, path: Path) -> OpenModel:
    """Return the model with another tokenizer, and without what its own one's ids say."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"{path}: a tokenizer of {tokenizer.vocab_size} tokens doesn't fit a model of {model.config.vocab_size}; "
            "give the one that the model was trained with"
        )
    if model.tokenizer is not None and model.tokenizer.fingerprint == tokenizer.fingerprint:
        return replace(model, tokenizer=tokenizer)
    facts = {name: value for name, value in model.facts.items() if name not in ("generation", "chat_template")}
    return replace(model, tokenizer=tokenizer, facts=facts)


def _is_whole_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint of ours that holds all weights."""
    return not is_foreign(path) and not is_adapter(path) and not read_state(path).get("adapter")


def open_start(path: Path, model: ModelConfig, fingerprint: str | None) -> OpenModel | None:
    """Open a model to start from; None for a whole one in a checkpoint of ours, which ranks load together.

    Refuses one whose shape or tokenizer isn't the run's, and says what else differs.
    """
    start = open_model(path) if not _is_whole_checkpoint(path) else None
    if start is not None:
        saved = start.config
        check_model(path, saved, start.tokenizer.fingerprint if start.tokenizer else None, model, fingerprint)
    else:
        check_same_model(path, model, fingerprint)
        saved = read_model_config(path)
    for name in ("rope_theta", "rope_scaling", "rms_norm_eps"):
        theirs, ours = getattr(saved, name), getattr(model, name)
        if theirs != ours:
            logger.warning("%s was trained with model.%s = %s, this run has %s", path, name, theirs, ours)
    return start


@torch.no_grad()
def fill_pieces_from(pieces: Sequence[Piece], weights: Weights) -> None:
    """Fill this rank's pieces of the parameters, in place; no more is read than they hold, or one tensor is."""
    for piece in pieces:
        shard = piece.shard().detach()
        if shard.numel():
            shard.copy_(weights.read(piece.name, tuple(piece.offset), tuple(shard.shape)))


def _training(state: dict[str, Any]) -> dict[str, Any]:
    progress = state.get("progress")
    if not progress:
        return {}
    sources = ", ".join(f"{name} ({facts['tokens']:,} tokens)" for name, facts in state["sources"].items())
    return {
        "trained for": f"{progress['step']:,} steps, {progress['tokens']:,} tokens",
        "trained on": sources,
        "trained with": ", ".join(f"{name} {version}" for name, version in state["versions"].items()),
    }
