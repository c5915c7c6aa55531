"""Everything one training run holds on one rank, and how it is set up, resumed and saved."""

import hashlib
import json
import logging
import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

import ternlm
from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import complete_steps, find_checkpoint
from ternlm.checkpoint.load import check_same_model, load_everything, load_weights, read_state
from ternlm.checkpoint.save import Saver
from ternlm.checkpoint.tensors import model_tensors, optimizer_tensors
from ternlm.config import Config, DataConfig, diff, load_config, render
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
from ternlm.train.distributed import LaidOut, build_laid_out, fill_pieces
from ternlm.train.models import fill_pieces_from, open_start
from ternlm.train.objective import LossFn, next_token_loss
from ternlm.train.precision import autocast, choose_device, choose_dtype, warn_of_slow_attention
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
    """What this rank updates of each parameter."""
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
        self.saver.save(self.progress.step, tensors, self._state())

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
            "versions": {
                "ternlm": ternlm.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def set_up(config: Config, resume: str = "auto", mesh: Mesh | None = None, restarted: bool = False) -> Run:
    """Build a run and load what it starts from. Collective: every rank of the mesh must call it.

    mesh: this rank's place; one rank on `compute.device` if not given.
    resume: "auto" goes on from the newest complete checkpoint in `config.out` if there is one; "never" starts anew and
    refuses a folder that holds checkpoints; anything else is the run's or checkpoint's folder to go on from.
    restarted: the same command was started before, so that what it has saved since comes first, whatever `resume` is.
    Raises ConfigError, DataError, ConvertError or CheckpointError before the first step.
    """
    checkpoint = _checkpoint_to_resume(Path(config.out), resume, restarted)
    source = find_model(config.load.checkpoint) if config.load.checkpoint and not checkpoint else None
    if mesh is None:
        resolve_layout(config, 1)
        mesh = one_rank(choose_device(config.compute.device))
    _check_all_see(checkpoint, mesh)
    device = mesh.device
    if config.compute.threads:
        torch.set_num_threads(config.compute.threads)
    compile_blocks = wants_compile(config.compute, device)
    tokenizer = find_tokenizer(config.data)
    _check_memory(config, mesh)
    loader, held_out = _open_data(config, tokenizer, mesh)
    check_alike("data", json.dumps(_describe_sources(loader), sort_keys=True), mesh)
    _check_tokenizer_fits(tokenizer, config)
    fingerprint = tokenizer.fingerprint if tokenizer else None
    start = None
    if checkpoint:
        _check_is_run(checkpoint)
        check_same_model(checkpoint, config.model, fingerprint)
        _check_same_optimizer(checkpoint, config)
    elif source:
        start = open_start(source, config.model, fingerprint)
    dtype = choose_dtype(config.compute, device)
    warn_of_slow_attention(device, dtype)
    laid_out = build_laid_out(config, mesh, dtype, compile_blocks)
    pieces = make_pieces(laid_out.model, mesh, config.parallel.sequence)
    fill_pieces(pieces, config)
    run = Run(
        config=config,
        mesh=mesh,
        dtype=dtype,
        laid_out=laid_out,
        pieces=pieces,
        optimizers=build_optimizers(pieces, config.optimizer, mesh),
        loss_fn=next_token_loss(config.loss, _byte_table(tokenizer, config, device)),
        loader=loader,
        held_out=held_out,
        tokenizer=tokenizer,
        saver=Saver(Path(config.out), config.checkpoint, lambda folder: _write_files(folder, config, tokenizer), mesh),
        progress=Progress(),
        scaler=LossScaler() if dtype == torch.float16 else None,
        spikes=SpikeRule(config.train),
    )
    if checkpoint:
        _resume(run, checkpoint)
    elif source:
        _start_from(source, start, pieces, mesh)
    return run


def _start_from(source: Path, start: OpenModel | None, pieces: list[Piece], mesh: Mesh) -> None:
    """Fill the parameters from a checkpoint of ours, or from a model of another format that is open."""
    if start is None:
        load_weights(pieces, source, mesh)
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


def _checkpoint_to_resume(out: Path, resume: str, restarted: bool) -> Path | None:
    newest = find_checkpoint(out) if complete_steps(out) else None
    if resume == "auto" or (restarted and newest):
        return newest
    if resume == "never":
        if newest:
            raise ConfigError(
                f"out = {str(out)!r} already holds checkpoints (newest: {newest.name}) and --resume is never; "
                "choose another out, or resume with --resume auto"
            )
        return None
    chosen = find_checkpoint(Path(resume))
    if newest and newest.resolve() != chosen.resolve():
        raise ConfigError(
            f"--resume {resume} means {chosen}, but out = {str(out)!r} already holds {newest.name}, which would be "
            "lost; choose another out, or go on from the newest with --resume auto"
        )
    return chosen


def _check_all_see(checkpoint: Path | None, mesh: Mesh) -> None:
    """Refuse to start where nodes look at different folders, or at an old state of one. Collective."""
    if not mesh.all_same(checkpoint.name if checkpoint else ""):
        raise CheckpointError(
            f"the ranks would go on from different checkpoints (rank {mesh.place.rank}: {checkpoint}); out must be on "
            "a file system that all nodes share: see whether it is, and start again"
        )


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


def _check_is_run(checkpoint: Path) -> None:
    if "progress" not in read_state(checkpoint):
        raise CheckpointError(
            f"{checkpoint}: holds an imported model's weights alone, no run to go on with; start a new one from them: "
            f"load.from={checkpoint}"
        )


def _check_same_optimizer(checkpoint: Path, config: Config) -> None:
    kind = _saved_config(checkpoint).optimizer.kind
    if kind != config.optimizer.kind:
        raise CheckpointError(
            f"{checkpoint} was trained with optimizer.kind = {kind}, whose state {config.optimizer.kind} can't use; "
            f"set optimizer.kind={kind}, or start a new run from its weights: load.from={checkpoint} and another out"
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
    for line in diff(_saved_config(checkpoint), run.config):
        logger.warning("changed since the checkpoint: %s", line)
    for name, source in _describe_sources(run.loader).items():
        if state["sources"].get(name, source) != source:
            logger.warning("the data of source %r has changed since the checkpoint: the order won't be the same", name)
    load_everything(run.pieces, run.optimizers, checkpoint, run.mesh)
    run.progress = Progress.from_state_dict(state["progress"])
    run.loader.load_state_dict(state["data"])
    run.spikes.load_state_dict(state["spikes"])
    if run.scaler and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    logger.info("resumed from %s", checkpoint)


def _saved_config(checkpoint: Path) -> Config:
    path = checkpoint / "config.toml"
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; take another checkpoint")
    try:
        return load_config(path)
    except (ConfigError, OSError) as reason:
        raise CheckpointError(f"{path}: can't be read ({reason}); take another checkpoint") from reason


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
