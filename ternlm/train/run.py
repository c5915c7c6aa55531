"""Everything one training run holds on one rank, and how it is set up, resumed and saved."""

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

import ternlm
from ternlm.checkpoint.load import load_everything, load_weights, read_state
from ternlm.checkpoint.save import Saver
from ternlm.checkpoint.tensors import model_tensors, optimizer_tensors
from ternlm.config import Config, DataConfig, diff, render
from ternlm.config.layout import resolve_layout
from ternlm.config.section import ConfigError
from ternlm.convert.detect import find_model
from ternlm.convert.weights import OpenModel
from ternlm.data.loader import Loader, ValidationBatches, validation_batches
from ternlm.data.shards import MANIFEST
from ternlm.data.tokenizer import Tokenizer, load_tokenizer
from ternlm.monitor.health import SpikeRule
from ternlm.monitor.memory import device_memory
from ternlm.optim.groups import build_optimizers
from ternlm.optim.scaler import LossScaler
from ternlm.parallel.apply import wants_compile
from ternlm.parallel.mesh import Mesh, one_rank
from ternlm.parallel.pieces import Piece, make_pieces
from ternlm.train.adapters import (
    fill_frozen,
    start_adapters,
)
from ternlm.train.distributed import LaidOut, build_laid_out, fill_pieces
from ternlm.train.models import fill_pieces_from
from ternlm.train.objective import LossFn, next_token_loss
from ternlm.train.precision import autocast, choose_device, choose_dtype, warn_of_slow_attention
from ternlm.train.start import check_all_see, checkpoint_to_resume, open_starts, saved_config
from ternlm.train.state import Progress

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """One run on one of its ranks."""

    config: Config
    mesh: Mesh
    dtype: torch.dtype
    laid_out: LaidOut
    pieces: list[Piece]
    """What this rank updates of each trained parameter."""
    optimizers: list[Optimizer]
    loss_fn: LossFn
    loader: Loader
    held_out: dict[str, ValidationBatches]
    tokenizer: Tokenizer | None
    """None where the data doesn't say which it was made with and the settings don't either."""
    saver: Saver
    progress: Progress
    scaler: LossScaler | None
    spikes: SpikeRule
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a checkpoint also tells of the model: its chat template and end tokens, and what it was adapted from."""
    stopped: str | None = None
    """Why training ended; None before and while it goes on."""

    @property
    def folder(self) -> Path:
        """Where the run's checkpoints and metrics lie."""
        return Path(self.config.out)

    @property
    def model(self) -> Any:
        """What holds this rank's parameters: a CausalLM, or the joined stages of a pipeline."""
        return self.laid_out.model

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.mesh.device

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which forward runs."""
        return autocast(self.device, self.dtype)

    def save(self) -> None:
        """Save a checkpoint of this moment. Collective: every rank must call it."""
        tensors = {**model_tensors(self.pieces), **optimizer_tensors(self.pieces, self.optimizers)}
        best = {self.progress.best_step} if self.config.validation.patience else set[int]()
        self.saver.save(self.progress.step, tensors, self._state(), best)

    def _state(self) -> dict[str, Any]:
        return {
            "format": 1,
            "progress": self.progress.state_dict(),
            "data": self.loader.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "spikes": self.spikes.state_dict(),
            "sources": _describe_sources(self.loader),
            "model": self.config.model.model_dump(mode="json", exclude_none=True),
            "tokenizer": {"fingerprint": self.tokenizer.fingerprint if self.tokenizer else None},
            **self.facts,
            "versions": {
                "ternlm": ternlm.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def set_up(
    config: Config,
    resume: str = "auto",
    mesh: Mesh | None = None,
    restarted: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Run:
    """Build a run and load what it starts from. Collective: every rank of the mesh must call it.

    mesh: this rank's place; one rank on `compute.device` if not given. resume: as `checkpoint_to_resume`.
    restarted: the same command was started before, so that what it has saved since comes first, whatever `resume` is.
    facts: of the model, to be saved with it, such as `chat_template` and `generation`.
    Raises ConfigError, DataError, ConvertError or CheckpointError before the first step.
    """
    checkpoint = checkpoint_to_resume(Path(config.out), resume, restarted)
    source = None
    if config.load.checkpoint and (config.adapter or not checkpoint):
        source = find_model(config.load.checkpoint)
    if mesh is None:
        resolve_layout(config, 1)
        mesh = one_rank(choose_device(config.compute.device))
    check_all_see(checkpoint, mesh)
    device = mesh.device
    if config.compute.threads:
        torch.set_num_threads(config.compute.threads)
    compile_blocks = wants_compile(config.compute, device)
    tokenizer = find_tokenizer(config.data)
    _check_memory(config, mesh)
    loader, held_out = _open_data(config, tokenizer, mesh)
    check_alike("data", json.dumps(_describe_sources(loader), sort_keys=True), mesh)
    _check_tokenizer_fits(tokenizer, config)
    told = {"facts": dict(facts)} if facts else {}
    start, adapters = open_starts(config, tokenizer, checkpoint, source)
    dtype = choose_dtype(config.compute, device)
    warn_of_slow_attention(device, dtype)
    laid_out = build_laid_out(config, mesh, dtype, compile_blocks)
    pieces = make_pieces(laid_out.model, mesh, config.parallel.sequence)
    trained = [piece for piece in pieces if piece.parameter.requires_grad]
    fill_pieces(trained, config)
    run = Run(
        config=config,
        mesh=mesh,
        dtype=dtype,
        laid_out=laid_out,
        pieces=trained,
        optimizers=build_optimizers(trained, config.optimizer, mesh),
        loss_fn=next_token_loss(config.loss, _byte_table(tokenizer, config, device)),
        loader=loader,
        held_out=held_out,
        tokenizer=tokenizer,
        saver=Saver(Path(config.out), config.checkpoint, lambda folder: _write_files(folder, config, tokenizer), mesh),
        progress=Progress(),
        scaler=LossScaler() if dtype == torch.float16 else None,
        spikes=SpikeRule(config.train),
        facts=told | ({"adapter": adapters} if adapters else {}),
    )
    _fill(run, pieces, start, source, resumed=bool(checkpoint))
    if checkpoint:
        _resume(run, checkpoint)
    return run


def _fill(run: Run, pieces: list[Piece], start: OpenModel | None, source: Path | None, resumed: bool) -> None:
    """Fill what a run doesn't read from a checkpoint of its own."""
    if source is None:
        return
    if run.config.adapter and start:
        fill_frozen(run.laid_out.model, pieces, start.weights)
        logger.info("frozen weights from %s", source)
        if not resumed:
            start_adapters(run.pieces, start.weights, run.config)
        return
    if start is None:
        load_weights(pieces, source, run.mesh)  # of ours, whatever layout saved them
    else:
        fill_pieces_from(pieces, start.weights)
    logger.info("weights from %s", source)


def find_tokenizer(data: DataConfig) -> Tokenizer | None:
    """Load the tokenizer that the settings name, else the one beside the first prepared source."""
    if data.tokenizer:
        return load_tokenizer(data.tokenizer)
    prepared = (source.path for source in data.sources if (Path(source.path) / MANIFEST).is_file())
    path = next(prepared, None)
    return load_tokenizer(path) if path else None


def _open_data(config: Config, tokenizer: Tokenizer | None, mesh: Mesh) -> tuple[Loader, dict[str, ValidationBatches]]:
    fingerprint = tokenizer.fingerprint if tokenizer else None
    rank, world, pin = mesh.place.data, mesh.layout.data, mesh.device.type == "cuda"
    loader = Loader(
        config.data,
        config.batch,
        config.seed,
        config.model.vocab_size,
        rank=rank,
        world=world,
        pin=pin,
        fingerprint=fingerprint,
    )
    held_out = validation_batches(
        config.data,
        config.batch,
        config.model.vocab_size,
        max_sequences=config.validation.max_sequences,
        rank=rank,
        world=world,
        pin=pin,
        fingerprint=fingerprint,
    )
    return loader, held_out


def check_alike(what: str, text: str, mesh: Mesh) -> None:
    """Refuse to start where ranks would train with different settings or data. Collective.

    text: all that tells them apart.
    """
    if not mesh.all_same(text):
        raise ConfigError(
            f"the ranks have different {what}; see whether all nodes have the same recipe, overrides and data (an old "
            "copy on one of them?), and start again"
        )


def _check_memory(config: Config, mesh: Mesh) -> None:
    """Refuse a model whose weights, gradients and optimizer alone don't fit, before anything is allocated."""
    layout, there = mesh.layout, device_memory(mesh.device)
    own = config.model.num_params / (layout.tensor * layout.pipeline)
    # float32: weights, gradients, two moments; each as finely as it is cut between steps.
    needed = own * (4 / layout.shard + 4 / layout.grads + 8 / layout.optimizer)
    if config.adapter:
        needed = own * (0.5 if config.adapter.base == "nf4" else 2) / layout.shard
    if needed > there:
        raise ConfigError(
            f"model: {config.model.num_params:,} parameters need {needed / 2**30:,.1f} GiB for weights, gradients and "
            f"optimizer on each rank, and {mesh.device.type} has {there / 2**30:,.1f}; choose a smaller model, a "
            "larger device, or more ranks and a finer sharding"
        )


def _check_tokenizer_fits(tokenizer: Tokenizer | None, config: Config) -> None:
    if tokenizer and tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} must be at least the tokenizer's {tokenizer.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )


def _describe_sources(loader: Loader) -> dict[str, dict[str, Any]]:
    """Tell the data apart from other data under the same path."""
    return {
        source.name: {
            "documents": source.store.num_documents,
            "tokens": source.store.num_tokens,
            "manifest": _hash_of(source.store.path / MANIFEST),
        }
        for source in loader.sources
    }


def _hash_of(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _resume(run: Run, checkpoint: Path) -> None:
    state = read_state(checkpoint)
    for line in diff(saved_config(checkpoint), run.config):
        logger.warning("changed since the checkpoint: %s", line)
    for name, source in _describe_sources(run.loader).items():
        if state["sources"].get(name, source) != source:
            logger.warning(
                "the data of source %r has changed since the checkpoint: from here it's other samples in other order, "
                "and what was held out may be trained on; for a run on the new data alone choose another out",
                name,
            )
    load_everything(run.pieces, run.optimizers, checkpoint, run.mesh)
    run.progress = Progress.from_state_dict(state["progress"])
    run.loader.load_state_dict(state["data"])
    run.spikes.load_state_dict(state["spikes"])
    if run.scaler and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    logger.info("resumed from %s", checkpoint)


def _byte_table(tokenizer: Tokenizer | None, config: Config, device: torch.device) -> torch.Tensor | None:
    if tokenizer is None:
        return None
    table = torch.zeros(config.model.vocab_size, dtype=torch.int32)
    counts = torch.from_numpy(tokenizer.token_bytes())
    table[: len(counts)] = counts
    return table.to(device)


def _write_files(folder: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    (folder / "config.toml").write_text(render(config), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)
