"""Arguments and options that several verbs take."""

from typing import Annotated, Literal

import typer

Recipe = Annotated[str, typer.Argument(help="A TOML file, or the name of one in the folder recipes.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change, as section.field=value.")]
Resume = Annotated[
    str, typer.Option(help="auto: from the run's newest complete checkpoint, if any; never; or a checkpoint's path.")
]
Base = Annotated[str | None, typer.Option(help="Model that adapters belong to.", show_default="the one that they name")]
Model = Annotated[
    str, typer.Argument(help="A run's folder, a checkpoint, a Hugging Face folder, a GGUF file, or smollm2.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto: cuda if there is one, else cpu.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the matrix products; auto: bfloat16 where the device is fast at it, else float32."),
]
Temperature = Annotated[float, typer.Option(help="0: always the most likely token.")]
TopK = Annotated[int, typer.Option(help="Choose among so many most likely tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Choose among the most likely tokens of this total share.")]
Penalty = Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
