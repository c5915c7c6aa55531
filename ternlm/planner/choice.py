"""One way to lay a run out: the settings that don't change what is trained, only how fast and in how much memory.

No torch here.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ternlm.config.layout import Layout, resolve_layout
from ternlm.config.load import config_from_dict, config_to_dict
from ternlm.config.run import Config
from ternlm.config.section import ConfigError

_SECTIONS = {
    "parallel": ("auto", "pipeline", "context", "tensor", "context_method", "pipeline_schedule", "stages_per_rank"),
    "sharding": ("params", "grads", "optimizer"),
    "compute": ("recompute", "recompute_keep"),
    "batch": ("microbatch_sequences",),
}

LEAST_CONTEXT_TOKENS = 1024
RECOMPUTE_KEEPS = ("matmuls", "nothing")


@dataclass(frozen=True)
class Choice:
    """Settings by their names."""

    pipeline: int = 1
    context: int = 1
    tensor: int = 1
    context_method: str = "ring"
    pipeline_schedule: str = "1f1b"
    stages_per_rank: int = 1
    microbatch_sequences: int = 1
    recompute: float = 0.0
    recompute_keep: str = "nothing"
    params: int = 1
    grads: int = 1
    optimizer: int = 1
    auto: bool = False
    """Whether it is left to the planner, which never chooses that."""

    def layout(self, world: int) -> Layout:
        """Return its numbers; all checks are `resolve_layout`'s."""
        return Layout(world, self.pipeline, self.context, self.tensor, self.params, self.grads, self.optimizer)

    def in_config(self, config: Config) -> Config:
        """Return the settings with this choice, unchecked: for predictions."""
        values = asdict(self)
        sections = {
            section: getattr(config, section).model_copy(update={name: values[name] for name in names})
            for section, names in _SECTIONS.items()
        }
        return config.model_copy(update=sections)

    def checked_in(self, config: Config) -> Config:
        """Return the settings with this choice, for training; raises ConfigError where they don't go together."""
        table: dict[str, Any] = config_to_dict(config)
        values = asdict(self)
        for section, names in _SECTIONS.items():
            table[section] |= {name: values[name] for name in names}
        return config_from_dict(table)

    def layout_problem(self, config: Config, world: int) -> str | None:
        """Return why it is no legal layout of `world` devices, None where it is one."""
        try:
            resolve_layout(self.in_config(config), world)
        except ConfigError as error:
            return str(error)
        return None

    def settings_problem(self, config: Config) -> str | None:
        """Return which other setting has no meaning with it, None where all have."""
        try:
            self.checked_in(config)
        except ConfigError as error:
            return str(error)
        return None

    def as_typed(self, before: "Choice", world: int) -> "Choice":
        """Return it with -1 for all ranks where another choice has that, too."""
        ranks = world // self.pipeline // self.tensor

        def typed(size: int, other: int) -> int:
            return -1 if (size, other) == (ranks, -1) else size

        return replace(
            self,
            params=typed(self.params, before.params),
            grads=typed(self.grads, before.grads),
            optimizer=typed(self.optimizer, before.optimizer),
        )

    def overrides(self, before: "Choice", world: int = 0) -> list[str]:
        """Return what to type to come here from another choice, as section.field=value.

        world: the devices that it is for; with them, a size of all ranks isn't typed where -1 stands for it already.
        """
        own, other = asdict(self.as_typed(before, world) if world else self), asdict(before)
        return [
            f"{section}.{name}={_typed(own[name])}"
            for section, names in _SECTIONS.items()
            for name in names
            if own[name] != other[name]
        ]


def choice_of(config: Config) -> Choice:
    """Return the choice that settings make, as they have it: -1 for a group of all ranks."""
    values = {name: getattr(getattr(config, section), name) for section, names in _SECTIONS.items() for name in names}
    return Choice(**values)


def meshes(config: Config, world: int, devices_per_node: int) -> Iterator[Choice]:
    """Yield degrees, schedule and microbatch, legal or not; recompute and sharding are as in `Choice()`.

    Tensor parallelism stays on a node, and context parallelism leaves a rank LEAST_CONTEXT_TOKENS of a sequence at
    least; else degrees are the divisors of the ranks that are left.
    """
    model, sequences = config.model, config.batch.global_sequences
    for tensor in _divisors(world, min(devices_per_node, model.num_attention_heads)):
        for pipeline in _divisors(world // tensor, model.num_hidden_layers):
            for context in _divisors(world // tensor // pipeline, config.data.seq_len // LEAST_CONTEXT_TOKENS):
                data = world // tensor // pipeline // context
                for rows in _microbatches(sequences // data) or [1]:  # refused later, with the reason
                    base = Choice(pipeline, context, tensor, microbatch_sequences=rows)
                    for method in ("ring", "all_to_all") if context > 1 else ("ring",):
                        for schedule, each in _schedules(pipeline, model.num_hidden_layers):
                            yield replace(base, context_method=method, pipeline_schedule=schedule, stages_per_rank=each)


def recomputes(choice: Choice) -> Iterator[Choice]:
    """Yield the same with each recompute, the least first."""
    yield choice
    for keep in RECOMPUTE_KEEPS:
        for share in (0.25, 0.5, 0.75, 1.0):
            yield replace(choice, recompute=share, recompute_keep=keep)


def shardings(choice: Choice, world: int) -> Iterator[Choice]:
    """Yield the same with each way to cut states, the least cut first."""
    ranks = world // choice.pipeline // choice.tensor
    for grads in _divisors(ranks):
        for optimizer in _divisors(ranks):
            if optimizer % grads == 0:
                yield replace(choice, params=1, grads=grads, optimizer=optimizer)
                if grads > 1:
                    yield replace(choice, params=grads, grads=grads, optimizer=optimizer)


def _typed(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _schedules(pipeline: int, layers: int) -> Iterator[tuple[str, int]]:
    yield "1f1b", 1
    if pipeline == 1:
        return
    for each in (2, 4, 8):
        if pipeline * each <= layers:
            yield "interleaved", each
    for each in (1, 2):
        if pipeline * each <= layers:
            yield "zero_bubble", each


def _microbatches(sequences: int) -> list[int]:
    """Return the powers of 2 that a rank's sequences are a multiple of."""
    return [rows for rows in (1, 2, 4, 8, 16, 32) if sequences >= rows and sequences % rows == 0]


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [i for i in range(1, min(number, number if most is None else max(most, 1)) + 1) if number % i == 0]
