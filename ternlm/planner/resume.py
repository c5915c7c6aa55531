"""Going on from a checkpoint elsewhere, by its few facts: settings, how far it has come. No torch here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ternlm.config.load import load_config
from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.planner.length import tokens_from
from ternlm.planner.units import human_count


@dataclass(frozen=True)
class Done:
    """How far a run has come."""

    step: int
    tokens: int

    def tokens_left(self, config: Config) -> float:
        """Return how many tokens are still to come."""
        return tokens_from(config, self.step)


def read_checkpoint(folder: Path, overrides: tuple[str, ...] = ()) -> tuple[Config, Done]:
    """Return a checkpoint's settings, with overrides, and progress; no tensor is read."""
    recipe, state = folder / "config.toml", folder / "state.json"
    if not recipe.is_file():
        raise ConfigError(f"{folder} has no config.toml: it is imported, not trained; give a recipe instead")
    try:
        progress = json.loads(state.read_text(encoding="utf-8"))["progress"]
        done = Done(int(progress["step"]), int(progress["tokens"]))
        if done.step < 0 or done.tokens < 0:
            raise ValueError(f"step {done.step} and tokens {done.tokens} must be at least 0")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(f"{state} can't be read ({error}); take another checkpoint") from error
    return load_config(recipe, overrides), done


def progress_figures(config: Config, done: Done) -> dict[str, Any]:
    """Return how far a run has come, as plain numbers."""
    return {
        "step": done.step,
        "steps": config.train.steps,
        "tokens": done.tokens,
        "tokens_left": done.tokens_left(config),
    }


def resume_lines(config: Config, done: Done, world: int | None = None) -> list[str]:
    """Return what is said of going on, with `world` devices if there is one number of them."""
    batch, full = config.batch, config.batch.global_sequences
    lines = [
        f"After {done.step:,} of {config.train.steps:,} steps, {human_count(done.tokens)} tokens; "
        f"{human_count(done.tokens_left(config))} are left."
    ]
    if done.step >= config.train.steps:
        return [*lines, "The run is complete; to go on, raise train.steps."]
    now = batch.sequences_at(done.step)
    goes_on = "stays" if now == full else f"goes on to grow, from {now:,} to"
    shared = f": {full / world:.4g} sequences a device" if world else ""
    lines.append(
        f"The global batch {goes_on} {full:,} sequences, {human_count(full * config.data.seq_len)} tokens, and the "
        f"data's order with it{shared}."
    )
    if world and full % world:
        below = full // world * world
        choices = [str(one) for one in (below, below + world) if one]
        lines.append(
            f"{world:,} devices can't each take as many of them; layouts in which several share a sequence are looked "
            f"for. Otherwise: batch.global_sequences={' or '.join(choices)}, which changes what is trained."
        )
    return lines
