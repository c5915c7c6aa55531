"""What to change where a run can't be as its settings say: the nearest legal layout, the cheapest that fits.

No torch here.
"""

from collections.abc import Iterator
from dataclasses import replace

from ternlm.config.layout import resolve_layout
from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.planner.choice import RECOMPUTE_KEEPS, Choice, choice_of, meshes, recomputes, shardings
from ternlm.planner.cluster import Cluster
from ternlm.planner.plan import Plan, check_document_tokens, in_format, make_plan


def plan_or_advise(config: Config, cluster: Cluster, world: int, document_tokens: int | None = None) -> Plan:
    """Predict a run; where its layout isn't legal, raise ConfigError that names the nearest one that is."""
    check_document_tokens(config, document_tokens)
    config = in_format(config, cluster)
    try:
        layout = resolve_layout(config, world)
    except ConfigError as error:
        nearest = nearest_legal(config, world, cluster.devices_per_node)
        if nearest is None:
            raise
        raise ConfigError(f"{error}\nnearest legal: {' '.join(nearest.overrides(choice_of(config), world))}") from error
    return make_plan(config, cluster, world, document_tokens, layout)


def cheapest_changes(
    config: Config, cluster: Cluster, world: int, document_tokens: int | None = None, count: int = 3
) -> list[tuple[Choice, Plan]]:
    """Return the fastest changes of one kind that make a legal run fit in less memory, the fastest first.

    Kinds: recomputing whole blocks, or all but their products; cuts; the microbatch; each degree.
    """
    layout = resolve_layout(config, world)
    now = replace(choice_of(config), params=layout.params, grads=layout.grads, optimizer=layout.optimizer)
    most = make_plan(config, cluster, world, document_tokens, layout).memory.bytes
    best: list[tuple[Choice, Plan]] = []
    for kind in _kinds(now, config, cluster, world):
        plans = _plans(kind, config, cluster, world, document_tokens)
        fitting = (one for one in plans if one[1].fits and one[1].memory.bytes < most)
        fastest = min(fitting, key=lambda one: one[1].time.seconds, default=None)
        if fastest:
            best.append(fastest)
    return sorted(best, key=lambda one: one[1].time.seconds)[:count]


def _kinds(now: Choice, config: Config, cluster: Cluster, world: int) -> Iterator[list[Choice]]:
    """Yield the choices that differ from the present one in one kind of setting."""
    for keep in RECOMPUTE_KEEPS:
        yield [one for one in recomputes(now) if one.recompute > now.recompute and one.recompute_keep == keep]
    yield [choice for choice in shardings(now, world) if choice != now]
    yield [
        replace(now, microbatch_sequences=rows)
        for rows in range(1, now.microbatch_sequences)
        if now.microbatch_sequences % rows == 0
    ]
    for degree in ("tensor", "pipeline", "context"):
        found = []
        for mesh in meshes(config, world, cluster.devices_per_node):
            moved = replace(now, **{degree: getattr(mesh, degree)})
            if getattr(moved, degree) > getattr(now, degree) and moved not in found:
                found.append(moved)
        yield [_within(moved, world) for moved in found]


def _within(choice: Choice, world: int) -> Choice:
    """Return the choice with cuts no wider than the ranks that its degrees leave."""
    ranks = world // choice.pipeline // choice.tensor
    sizes = {name: min(getattr(choice, name), ranks) for name in ("params", "grads", "optimizer")}
    return replace(choice, **sizes)


def _plans(
    choices: list[Choice], config: Config, cluster: Cluster, world: int, document_tokens: int | None
) -> Iterator[tuple[Choice, Plan]]:
    for choice in choices:
        try:
            yield choice, make_plan(choice.checked_in(config), cluster, world, document_tokens)
        except ConfigError:  # isn't legal
            continue


def nearest_legal(config: Config, world: int, devices_per_node: int) -> Choice | None:
    """Return the legal choice that differs least from what the settings ask for; None where there is none."""
    wanted = replace(choice_of(config), auto=False)

    def apart(choice: Choice) -> float:
        return sum(
            weight * _steps(getattr(choice, name), getattr(wanted, name)) for name, weight in _DEGREES.items()
        ) + ((choice.pipeline_schedule != wanted.pipeline_schedule) + (choice.context_method != wanted.context_method))

    base = replace(wanted, params=1, grads=1, optimizer=1)
    names = ("pipeline", "context", "tensor", "context_method", "pipeline_schedule", "stages_per_rank")
    own = [wanted] if world % (wanted.pipeline * wanted.context * wanted.tensor) == 0 else []
    candidates = [*own, *sorted(meshes(config, world, devices_per_node), key=apart)]
    for mesh in candidates:
        moved = replace(base, **{name: getattr(mesh, name) for name in (*names, "microbatch_sequences")})
        ranks = world // moved.pipeline // moved.tensor
        cuts = sorted(shardings(moved, world), key=lambda cut: _cut_apart(cut, wanted, ranks))
        for cut in cuts[:8]:
            if not (cut.layout_problem(config, world) or cut.settings_problem(config)):
                return cut.as_typed(wanted, world)
    return None


_DEGREES = {"tensor": 4.0, "pipeline": 4.0, "context": 4.0, "stages_per_rank": 1.0, "microbatch_sequences": 1.0}
"""What a doubling weighs."""


def _steps(one: int, other: int) -> float:
    """Return how far apart two degrees are, the root of their ratio less 1: 0 for the same, 1 for twice as many."""
    return abs((one / other if one > other else other / one) - 1) ** 0.5


def _cut_apart(cut: Choice, wanted: Choice, ranks: int) -> float:
    names = ("params", "grads", "optimizer")
    sizes = [ranks if getattr(wanted, name) == -1 else getattr(wanted, name) for name in names]
    return sum(_steps(getattr(cut, name), size) for name, size in zip(names, sizes, strict=True))
