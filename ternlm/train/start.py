"""What a run starts from: one of its own checkpoints, another model's weights, or a model that its adapters belong to.

Everything is checked here before anything is built; `set_up` then fills the model from what this has opened.
"""

from pathlib import Path
from typing import Any

from ternlm.checkpoint.errors import CheckpointError
from ternlm.checkpoint.folders import complete_steps, find_checkpoint
from ternlm.checkpoint.load import check_model, check_same_model, read_state
from ternlm.config import Config, load_config
from ternlm.config.section import ConfigError
from ternlm.convert.weights import OpenModel
from ternlm.data.tokenizer import Tokenizer
from ternlm.parallel.mesh import Mesh
from ternlm.train.adapters import check_same_base, describe_base, pinned, read_start
from ternlm.train.models import open_model, open_start


def checkpoint_to_resume(out: Path, resume: str, restarted: bool) -> Path | None:
    """Return the checkpoint that a run in the folder `out` goes on from, if any.

    resume: "auto" goes on from the newest complete checkpoint in `out` if there is one; "never" starts anew and refuses
    a folder that holds checkpoints; anything else is the run's or checkpoint's folder to go on from. restarted: as for
    `set_up`.
    """
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


def check_all_see(checkpoint: Path | None, mesh: Mesh) -> None:
    """Refuse to start where nodes look at different folders, or at an old state of one. Collective."""
    if not mesh.all_same(checkpoint.name if checkpoint else ""):
        raise CheckpointError(
            f"the ranks would go on from different checkpoints (rank {mesh.place.rank}: {checkpoint}); out must be on "
            "a file system that all nodes share: see whether it is, and start again"
        )


def open_starts(
    config: Config, tokenizer: Tokenizer | None, checkpoint: Path | None, source: Path | None
) -> tuple[OpenModel | None, dict[str, Any] | None]:
    """Check what a run starts from; return the model whose weights are read by name, and what describes adapters."""
    fingerprint = tokenizer.fingerprint if tokenizer else None
    start = described = None
    if source and config.adapter:
        source = _as_it_was(pinned(source), checkpoint)
        start = open_model(source)
        theirs = start.tokenizer.fingerprint if start.tokenizer else None
        check_model(source, start.config, theirs, config.model, fingerprint)
        described = describe_base(source, start.weights, config.adapter)
        if not checkpoint:
            read_start(config)
    elif source and not checkpoint:
        start = open_start(source, config.model, fingerprint)
    if checkpoint:
        _check_is_run(checkpoint)
        check_same_model(checkpoint, config.model, fingerprint)
        check_same_base(checkpoint, read_state(checkpoint).get("adapter"), described)
        _check_same_optimizer(checkpoint, config)
    return start, described


def _as_it_was(source: Path, checkpoint: Path | None) -> Path:
    """Return the checkpoint that a run's adapters began with, where the run that it's of has gone on since."""
    saved = read_state(checkpoint).get("adapter") if checkpoint else None
    before = Path(saved["base"]) if saved else source
    same_run = before.parent == source.resolve().parent and before.name.startswith("step-")
    return before if same_run and before.exists() else source


def _check_is_run(checkpoint: Path) -> None:
    if "progress" not in read_state(checkpoint):
        raise CheckpointError(
            f"{checkpoint}: holds an imported model's weights alone, no run to go on with; start a new one from them: "
            f"load.from={checkpoint}"
        )


def _check_same_optimizer(checkpoint: Path, config: Config) -> None:
    kind = saved_config(checkpoint).optimizer.kind
    if kind != config.optimizer.kind:
        raise CheckpointError(
            f"{checkpoint} was trained with optimizer.kind = {kind}, whose state {config.optimizer.kind} can't use; "
            f"set optimizer.kind={kind}, or start a new run from its weights: load.from={checkpoint} and another out"
        )


def saved_config(checkpoint: Path) -> Config:
    """Read the settings that a checkpoint was saved with."""
    path = checkpoint / "config.toml"
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; take another checkpoint")
    try:
        return load_config(path)
    except (ConfigError, OSError) as reason:
        raise CheckpointError(f"{path}: can't be read ({reason}); take another checkpoint") from reason
