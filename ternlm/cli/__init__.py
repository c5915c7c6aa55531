"""The command `tern`: each verb reads its options and calls one function of a package.

Packages are imported inside the verbs, so that `tern --help` answers at once.
"""

import errno
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from ternlm.cli.bench import bench
from ternlm.cli.calibrate import calibrate
from ternlm.cli.client import client
from ternlm.cli.convert import export_model, import_ancestors_config, import_foreign, merge_adapter
from ternlm.cli.data import data
from ternlm.cli.models import ready, room_for
from ternlm.cli.options import (
    Base,
    Device,
    Dtype,
    Model,
    Overrides,
    Penalty,
    Recipe,
    Resume,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from ternlm.cli.plan import plan
from ternlm.cli.serve import serve
from ternlm.cli.web import web

app = typer.Typer(
    name="tern",
    help="TernLM: train, evaluate and use large language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config = typer.Typer(help="Look at the settings of a run.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")
app.add_typer(config, name="config")


def main() -> None:
    """Run the command line; what the user can put right is printed without a traceback, with exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_StderrNow()])
    try:
        app()
    except SystemExit:
        raise
    except BaseException as error:  # DCP's isn't an Exception
        from ternlm.config import UserError
        from ternlm.parallel.launch import Launch, end_rank, find_launch

        message = _explain(error)
        try:
            launch = find_launch()
        except UserError:  # what `error` says, then
            launch = Launch()
        if launch.world > 1:
            end_rank(launch, error, message)
        if message is None:
            raise
        _fail(message)


def _explain(error: BaseException) -> str | None:
    """Return what to tell of an error that the user can put right, None of another."""
    from ternlm.config import UserError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
        return f"{error.filename or 'writing failed'}: {error.strerror}"
    return None


def _fail(message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    sys.exit(2)


class _StderrNow(logging.StreamHandler):
    """Writes to what `sys.stderr` is at the moment: a progress bar stands in for it, and prints above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


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
    resume: Resume = "auto",
) -> None:
    """Pretrain a model as RECIPE says."""
    from ternlm.config import load_config

    settings = load_config(recipe, overrides or [])  # before torch loads: a mistake shows at once
    from ternlm.config.layout import resolve_layout
    from ternlm.parallel.launch import find_launch

    if not settings.parallel.auto:
        resolve_layout(settings, find_launch().world)
    from ternlm.infer.text import continue_texts
    from ternlm.train.pretrain import pretrain

    pretrain(settings, resume, continue_texts)


@app.command()
def sft(recipe: Recipe, overrides: Overrides = None, resume: Resume = "auto") -> None:
    """Fine-tune a model on conversations as RECIPE says: whole, or by adapters."""
    from ternlm.config import load_sft_config

    settings = load_sft_config(recipe, overrides or [])
    from ternlm.post.sft import fine_tune

    fine_tune(settings, resume)


@app.command()
def simulate(
    recipe: Recipe,
    world_size: Annotated[int, typer.Option(help="Ranks of the run, one on each device.", min=1)],
    overrides: Overrides = None,
    rank: Annotated[int, typer.Option(help="Which of them to simulate.")] = 0,
    devices_per_node: Annotated[
        int | None, typer.Option(help="Ranks of one node.", min=1, show_default="parallel.cluster's, else 8")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to, as JSON.")] = None,
    timeline: Annotated[Path | None, typer.Option(help="File to write a trace to, for ui.perfetto.dev.")] = None,
) -> None:
    """Count the memory and messages of one rank's training step on many devices, on none."""
    from ternlm.config import load_config

    settings = load_config(recipe, overrides or [])
    from ternlm.train.simulate_report import run_simulation

    run_simulation(settings, world_size, rank, devices_per_node, json, timeline)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; give it again for several at a time.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.")] = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    base: Base = None,
) -> None:
    """Continue prompts with a trained model; a single one's text appears as it is generated."""
    from ternlm.infer.params import SamplingParams
    from ternlm.infer.text import generate_texts, stop_ids, stream_text

    sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    with ready(model, device, dtype, base) as (opened, network):
        tokenizer = opened.tokenizer
        assert tokenizer is not None  # `loaded` has seen to it
        params = replace(sampling, stop_ids=stop_ids(tokenizer))
        if len(prompt) == 1:
            begun: list[str] = []  # the prompt is shown with the first piece, once nothing can be wrong with it

            def show(piece: str) -> None:
                typer.echo(piece if begun else prompt[0] + piece, nl=False)
                begun.append(piece)

            stream_text(network, tokenizer, prompt[0], params, show)
            typer.echo("" if begun else prompt[0])
            return
        for text, continuation in zip(prompt, generate_texts(network, tokenizer, prompt, params), strict=True):
            typer.echo(text + continuation)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    protocol: Annotated[
        Literal["internlm", "internlm2", "chatml", "llama3"] | None,
        typer.Option(help="How it was trained to chat.", show_default="the model's own"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 1024,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.8,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    base: Base = None,
) -> None:
    """Talk with a model: a line is a question, Ctrl-C ends an answer, Ctrl-D the conversation; /help says more."""
    from ternlm.cli.terminal import Conversation, talk
    from ternlm.infer.chat import start_chat
    from ternlm.infer.params import SamplingParams

    params = SamplingParams(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    settings = {name: getattr(params, name) for name in names}
    with ready(model, device, dtype, base) as (opened, network):
        lengths = 1 if network.config.rope_scaling.kind == "default" else 4
        answerer = start_chat(opened, network, params, protocol, room_for(network, lengths))
        talk(
            Conversation(
                lambda messages, settings: answerer.answer(messages, replace(answerer.params, **settings)),
                settings,
                system,
            )
        )


@config.command("show")
def show_config(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print every setting of RECIPE, with its meaning, unit and default, as TOML that is a recipe itself."""
    from ternlm.config import load_any_config, render

    typer.echo(render(load_any_config(recipe, overrides or [])), nl=False)


@config.command("schema")
def show_schema(
    kind: Annotated[Literal["train", "sft"], typer.Argument(help="The verb that takes the recipe.")] = "train",
) -> None:
    """Print the JSON schema of a recipe, for editors that complete and check TOML."""
    import json

    from ternlm.config import Config, SftConfig, json_schema

    typer.echo(json.dumps(json_schema(SftConfig if kind == "sft" else Config), indent=2))


@config.command("list")
def list_configs() -> None:
    """List the recipes in the folder recipes, each with its first line."""
    from ternlm.config import list_recipes

    recipes = list_recipes()
    if not recipes:
        _fail("there is no folder `recipes` here; go to a checkout of TernLM, or to a folder that has one")
    for path in recipes:
        with path.open(encoding="utf-8") as file:
            typer.echo(f"{path}: {file.readline().lstrip('# ').strip()}")


app.command("plan")(plan)
app.command("export")(export_model)
app.command("merge")(merge_adapter)
app.command("import")(import_foreign)
app.command("import-config")(import_ancestors_config)
app.command("calibrate")(calibrate)
app.command("serve")(serve)
app.command("client")(client)
app.command("web")(web)
