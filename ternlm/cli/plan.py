"""The verb that predicts a run before it takes place."""

from pathlib import Path
from typing import Annotated

import typer

from ternlm.cli.options import Overrides

RecipeOrNone = Annotated[
    str | None, typer.Argument(help="A TOML file, or the name of one in the folder recipes.", show_default=False)
]
ClusterName = Annotated[
    str | None,
    typer.Option(
        help="Known one, such as h100x8 or h100x8@800 (Gb/s of a node), or a file of `tern calibrate`.",
        show_default="parallel.cluster, else h100x8",
    ),
]


def plan(
    recipe: RecipeOrNone = None,
    overrides: Overrides = None,
    cluster: ClusterName = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes of the run.", min=1, show_default="1")] = None,
    devices: Annotated[
        int | None, typer.Option(help="Devices of the run, instead of --nodes.", min=1, show_default=False)
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Find the fastest layouts that fit.")] = False,
    top: Annotated[int | None, typer.Option(help="How many of them to show.", min=1, show_default="10")] = None,
    what_if: Annotated[
        Path | None,
        typer.Option(help="A run or checkpoint to go on from, instead of RECIPE.", show_default=False),
    ] = None,
    scale: Annotated[int, typer.Option(help="Show a table from one node to so many devices, such as 4096.", min=0)] = 0,
    grow_batch: Annotated[
        bool, typer.Option("--grow-batch", help="In that table, let the global batch grow with the devices.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="File for that table's plot: .png, .svg or .pdf.", show_default=False)
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(help="Length of the run, or with --what-if of its rest.", show_default="the recipe's", min=1),
    ] = None,
    dollars_per_hour: Annotated[
        float | None, typer.Option(help="Price of a device for an hour.", show_default="the cluster's", min=0)
    ] = None,
    document_tokens: Annotated[
        int | None, typer.Option(help="Mean length of the documents.", show_default="whole sequences", min=1)
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="File to write the figures to, as JSON.", show_default=False)
    ] = None,
) -> None:
    """Predict time, memory and cost of RECIPE on a cluster, or find its best layout, on no device."""
    from ternlm.planner.job import Request, run_plan

    given = [one for one in (recipe, *(overrides or [])) if one is not None]
    request = Request(
        settings=tuple(given),
        cluster=cluster,
        nodes=nodes,
        devices=devices,
        search=search,
        top=top,
        scale_to=scale,
        grow_batch=grow_batch,
        plot=plot,
        tokens=tokens,
        dollars_per_hour=dollars_per_hour,
        document_tokens=document_tokens,
        json=json,
    )
    if what_if is None:
        run_plan(request)
        return
    from ternlm.checkpoint.folders import find_checkpoint

    run_plan(request, find_checkpoint(what_if))
