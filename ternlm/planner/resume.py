"""Going on from a checkpoint elsewhere, by its few facts: settings, how far it has come. No torch here."""

import json
from dataclasses import dataclass
from pathlib import Path

from ternlm.config.load import load_config
from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.planner.units import human_count


@dataclass(frozen=True)
class Done:
    """How far a run has come."""

    step: int
    tokens: int

    def tokens_left(self, config: Config) -> float:
        """Return how many tokens are still to come, batches of full size assumed."""
        steps = config.train.steps - self.step
        return float(max(steps, 0) * config.batch.global_sequences * config.data.seq_len)


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


def resume_lines(config: Config, done: Done, world: int) -> list[str]:
    """Return what is said of going on with `world` devices."""
    batch, left = config.batch, done.tokens_left(config)
    tokens = batch.global_sequences * config.data.seq_len
    lines = [
        f"After {done.step:,} of {config.train.steps:,} steps, {human_count(done.tokens)} tokens; "
        f"{human_count(left)} are left.",
        f"The global batch stays {batch.global_sequences:,} sequences, {human_count(tokens)} tokens, and the data's "
        f"order with it: {batch.global_sequences / world:.4g} sequences a device.",
    ]
    if batch.global_sequences % world:
        below = batch.global_sequences // world * world
        choices = [str(one) for one in (below, below + world) if one]
        lines.append(
            f"{world:,} devices can't each take as many of them; layouts in which several share a sequence are looked "
            f"for. Otherwise: batch.global_sequences={' or '.join(choices)}, which changes what is trained."
        )
    return lines
