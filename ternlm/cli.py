"""The command `tern`: each verb reads its options and calls one function of a package.

Packages are imported inside the verbs, so that `tern --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="tern",
    help="TernLM: train, evaluate and use large language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Turn raw text into tokens, and look at them.", no_args_is_help=True)
config = typer.Typer(help="Look at the settings of a run.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(config, name="config")

Recipe = Annotated[str, typer.Argument(help="A TOML file, or the name of one in the folder recipes.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change, as section.field=value.")]


def main() -> None:
    """Run the command line; what the user can put right is printed without a traceback, with exit code 2."""
    try:
        app()
    except ValueError as error:
        from ternlm.config import UserError

        if not isinstance(error, UserError):
            raise
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ternlm import __version__

        typer.echo(f"ternlm {__version__}")
        raise typer.Exit


@app.callback()
def _tern(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    minutes: Annotated[float, typer.Option(help="Time for training.", min=0.1)] = 4.0,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as the process may use.", min=0)] = 0,
) -> None:
    """Train a small model from raw text on this machine, and print what it writes."""
    from ternlm.infer.text import continue_texts
    from ternlm.train.quickstart import quickstart

    quickstart(out, minutes, threads, continue_texts)


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: from the run's newest complete checkpoint, if any; never; or a checkpoint's path."
        ),
    ] = "auto",
) -> None:
    """Pretrain a model as RECIPE says."""
    from ternlm.config import load_config

    settings = load_config(recipe, overrides or [])  # before torch loads: a mistake shows at once
    from ternlm.infer.text import continue_texts
    from ternlm.train.pretrain import pretrain

    pretrain(settings, resume, continue_texts)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; give it again for several at a time.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among so many most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the most likely tokens of this total share.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto: cuda if there is one, else cpu.")] = "auto",
) -> None:
    """Continue prompts with a trained model."""
    from ternlm.checkpoint.load import load_weights, read_model_config
    from ternlm.data.tokenizer import load_tokenizer


@config.command("show")
def show_config(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print every setting of RECIPE, with its meaning, unit and default, as TOML that is a recipe itself."""
    from ternlm.config import load_config, render

    typer.echo(render(load_config(recipe, overrides or [])), nl=False)


@config.command("schema")
def show_schema() -> None:
    """Print the JSON schema of a recipe, for editors that complete and check TOML."""
    import json

    from ternlm.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@config.command("list")
def list_configs() -> None:
    """List the recipes in the folder recipes, each with its first line."""
    from ternlm.config import list_recipes

    for path in list_recipes():
        with path.open(encoding="utf-8") as file:
            typer.echo(f"{path}: {file.readline().lstrip('# ').strip()}")
