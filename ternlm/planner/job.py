"""What `tern plan` does: settings and a cluster in; tables, figures and a plot out. No torch here."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ternlm.config.load import load_config
from ternlm.config.outputs import check_writable
from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.planner.advice import cheapest_changes, plan_or_advise
from ternlm.planner.choice import choice_of
from ternlm.planner.cluster import Cluster
from ternlm.planner.known import find_cluster
from ternlm.planner.length import run_length, tokens_from
from ternlm.planner.memory import GIB
from ternlm.planner.plan import Plan, in_format
from ternlm.planner.resume import Done, progress_figures, read_checkpoint, resume_lines
from ternlm.planner.scale import doublings, plot_scale, scale, scale_figures, scale_notes, scale_table
from ternlm.planner.search import Search
from ternlm.planner.show import length_words, plan_figures, plan_tables
from ternlm.planner.show_search import search_figures, search_tables

CLUSTER, TOP = "h100x8", 10
"""Where nothing else is said."""


@dataclass(frozen=True)
class Request:
    """What was asked."""

    settings: tuple[str, ...]
    """The recipe and its overrides; overrides alone where a checkpoint is given."""
    cluster: str | None = None
    """If not given, `parallel.cluster`, else CLUSTER."""
    nodes: int | None = None
    devices: int | None = None
    search: bool = False
    top: int | None = None
    scale_to: int = 0
    grow_batch: bool = False
    plot: Path | None = None
    tokens: float | None = None
    dollars_per_hour: float | None = None
    document_tokens: int | None = None
    json: Path | None = None


def run_plan(request: Request, checkpoint: Path | None = None) -> None:
    """Print what was asked, and write the files; wrong requests raise ConfigError before anything is predicted."""
    _check(request, checkpoint)
    done: Done | None = None
    if checkpoint:
        config, done = read_checkpoint(checkpoint, request.settings)
    else:
        config = load_config(request.settings[0], request.settings[1:])
    _check_top(request, bool(checkpoint) or config.parallel.auto)
    cluster = find_cluster(request.cluster or config.parallel.cluster or CLUSTER)
    if request.dollars_per_hour is not None:
        cluster = cluster.model_copy(update={"dollars_per_hour": request.dollars_per_hour})
    world = request.devices or (request.nodes or 1) * cluster.devices_per_node
    job = _Job(request, config, cluster, world, done)
    figures = job.run()
    if request.json:
        request.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _check(request: Request, checkpoint: Path | None) -> None:
    if not checkpoint and not (request.settings and "=" not in request.settings[0]):
        raise ConfigError("give a RECIPE, such as recipes/internlm_7b.toml, or a checkpoint with --what-if")
    if checkpoint and any("=" not in setting for setting in request.settings):
        raise ConfigError(
            f"--what-if = {checkpoint} has its own settings, so {request.settings[0]!r} must be left out; to change "
            "some, add section.field=value"
        )
    _check_numbers(request)
    for option, needed in (("plot", request.plot is not None), ("grow-batch", request.grow_batch)):
        if needed and not request.scale_to:
            raise ConfigError(f"--{option} is of the table of --scale; add --scale 4096, say")
    for option, file in (("--json", request.json), ("--plot", request.plot)):
        if file is not None:
            check_writable(option, file)
    if request.plot and request.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot = {request.plot} must end in .png, .svg or .pdf; choose another name")


def _check_numbers(request: Request) -> None:
    for option, number, least, remedy in (
        ("tokens", request.tokens, 1, "give the run's length, such as 1e12"),
        ("dollars-per-hour", request.dollars_per_hour, 0, "give the price of a device for an hour, such as 2.5"),
    ):
        if number is not None and not (math.isfinite(number) and number >= least):
            raise ConfigError(f"--{option} = {number:g} must be a finite number of at least {least}; {remedy}")
    if request.nodes and request.devices:
        raise ConfigError(
            f"--nodes = {request.nodes} has no effect beside --devices = {request.devices}, which is the size of the "
            "whole run; leave one of them out"
        )


def _check_top(request: Request, searches: bool) -> None:
    """Refuse a number of layouts to show where one is shown; searches: what asks for a search without --search."""
    if request.top is None or ((request.search or searches) and not request.scale_to):
        return
    where = "with --scale, which shows one layout a number of devices" if request.scale_to else "without --search"
    remedy = "leave it out" if request.scale_to else "add --search, or leave it out"
    raise ConfigError(f"--top = {request.top} has no effect {where}; {remedy}")


class _Job:
    """One request, with everything it needs."""

    def __init__(self, request: Request, config: Config, cluster: Cluster, world: int, done: Done | None) -> None:
        self.request, self.cluster, self.world, self.done = request, cluster, world, done
        self.config = in_format(config, cluster)  # before anything else is said
        self.first = done.step if done else 0
        self.tokens = request.tokens or tokens_from(config, self.first)
        self.searches = request.search or config.parallel.auto
        self.console = Console()

    def run(self) -> dict[str, Any]:
        """Print what was asked; return its figures."""
        if self.config.optimizer.kind == "muon":
            self.console.print("Muon is counted as AdamW: its iterations take longer, its states less memory.")
        if self.done:
            return {"done": progress_figures(self.config, self.done), **self.go_on(self.done)}
        return self.scale() if self.request.scale_to else self.search() if self.searches else self.plan()

    def go_on(self, done: Done) -> dict[str, Any]:
        """Print how far a run has come, and what was asked of the rest."""
        for line in resume_lines(self.config, done, None if self.request.scale_to else self.world):
            self.console.print(line, highlight=False)
        if done.step >= self.config.train.steps:
            return {"complete": True}
        return self.scale() if self.request.scale_to else self.search()

    def plan(self) -> dict[str, Any]:
        """Print the plan of the settings as they are."""
        plan = plan_or_advise(self.config, self.cluster, self.world, self.request.document_tokens)
        length = run_length(plan, self.tokens)
        self.console.print(plan_tables(plan, length))
        if not plan.fits:
            self._advise()
        return plan_figures(plan, length)

    def search(self) -> dict[str, Any]:
        """Print the best layouts."""
        with Console(stderr=True).status(f"looking through the layouts of {self.world:,} devices"):
            search = Search(self.config, self.cluster, self.world, self.request.document_tokens)
            found = search.run(self.request.top or TOP)
        self.console.print(search_tables(found, self.config))
        length = run_length(found.best[0][1], self.tokens, self.first)
        self.console.print(length_words(length), highlight=False)
        self._as_it_is()
        return search_figures(found, self.config, self.tokens, self.first)

    def scale(self) -> dict[str, Any]:
        """Print the table over numbers of devices, and draw it."""
        first, request = self.cluster.devices_per_node, self.request
        if request.scale_to < first:
            raise ConfigError(f"--scale = {request.scale_to} must be at least a node's {first} devices; choose more")
        each = self.config.batch.global_sequences / self.world if request.grow_batch else 0.0
        worlds = doublings(first, request.scale_to)
        with Console(stderr=True).status("predicting"):
            points = scale(self.config, self.cluster, worlds, request.document_tokens, each, self.searches)
        self.console.print(scale_table(points, self.tokens, self.first))
        for line in scale_notes(points):
            self.console.print(line, highlight=False)
        if request.plot:
            plot_scale(points, request.plot)
        cluster = {"cluster": self.cluster.name, "devices_per_node": first}
        return {**cluster, "points": scale_figures(points, self.tokens, self.first)}

    def _as_it_is(self) -> None:
        """Say how the settings' own layout does."""
        if self.config.parallel.auto:
            return
        try:
            plan = plan_or_advise(self.config, self.cluster, self.world, self.request.document_tokens)
        except ConfigError as error:
            self.console.print(f"The settings' own layout isn't legal here: {error}", highlight=False)
            return
        fits = "" if plan.fits else f", and doesn't fit: {plan.memory.bytes / GIB:.1f} GiB"
        self.console.print(f"The settings' own: {plan.tokens_per_second:,.0f} tokens/s a device{fits}", highlight=False)

    def _advise(self) -> None:
        changes = cheapest_changes(self.config, self.cluster, self.world, self.request.document_tokens)
        if not changes:
            self.console.print("No change of one kind makes it fit; --search looks for several.", highlight=False)
            return
        self.console.print("What makes it fit, the fastest first:", highlight=False)
        for choice, plan in changes:
            self.console.print(
                f"  {_said(choice.overrides(choice_of(self.config), self.world), plan)}", highlight=False
            )


def _said(overrides: list[str], plan: Plan) -> str:
    return f"{' '.join(overrides)}: {plan.tokens_per_second:,.0f} tokens/s a device, {plan.memory.bytes / GIB:.1f} GiB"
