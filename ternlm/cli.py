"""The command `tern`: each verb reads its options and calls one function of a package.

Packages are imported inside the verbs, so that `tern --help` answers at once.
"""

import errno
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

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
Inputs = Annotated[list[Path], typer.Argument(help="Files, and folders of files: txt, json, jsonl, parquet.")]
Format = Annotated[
    Literal["auto", "text", "json", "jsonl", "parquet", "internlm"],
    typer.Option(help="What the files are; auto: by their names' endings."),
]
Include = Annotated[str, typer.Option(help="Pattern of the files to take from folders, such as '*.txt'.")]
Field = Annotated[str, typer.Option(help="Field of a record, or column, that holds the text.")]
TextDocument = Annotated[
    Literal["file", "line", "paragraph"], typer.Option(help="What is one document in a text file.")
]
OnError = Annotated[
    Literal["fail", "skip"], typer.Option(help="A record that can't be used ends the work, or is left out and counted.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change, as section.field=value.")]


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
    resume: Annotated[
        str,
        typer.Option(help="auto: from the run's newest complete checkpoint, if any; never; or a checkpoint's path."),
    ] = "auto",
) -> None:
    """Pretrain a model as RECIPE says."""
    from ternlm.config import load_config

    settings = load_config(recipe, overrides or [])  # before torch loads: a mistake shows at once
    from ternlm.infer.text import continue_texts
    from ternlm.train.pretrain import pretrain

    pretrain(settings, resume, continue_texts)


@app.command()
def simulate(
    recipe: Recipe,
    world_size: Annotated[int, typer.Option(help="Ranks of the run, one on each device.", min=1)],
    overrides: Overrides = None,
    rank: Annotated[int, typer.Option(help="Which of them to simulate.")] = 0,
    devices_per_node: Annotated[int, typer.Option(help="Ranks of one node.", min=1)] = 8,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to, as JSON.")] = None,
    timeline: Annotated[Path | None, typer.Option(help="File to write a trace to, for ui.perfetto.dev.")] = None,
) -> None:
    """Count the memory and messages of one rank's training step on many devices, on none."""
    from ternlm.config import load_config

    settings = load_config(recipe, overrides or [])
    from ternlm.train.simulate_report import run_simulation

    run_simulation(settings, world_size, rank, devices_per_node, json, timeline)


@app.command("import-config")
def import_ancestors_config(
    file: Annotated[Path, typer.Argument(metavar="CONFIG", help="A configuration (.py) of InternLM's framework.")],
    out: Annotated[Path | None, typer.Option(help="Recipe to write.", show_default="print it")] = None,
    data_ranks: Annotated[int, typer.Option(help="Its data-parallel ranks, by which its batch grew.", min=1)] = 1,
) -> None:
    """Turn a configuration of InternLM's training framework into a recipe, and list what has no counterpart."""
    from ternlm.convert.import_config import import_config, write_recipe

    recipe, notes = import_config(file, data_ranks)
    if out is None:
        typer.echo(recipe, nl=False)
    else:
        write_recipe(recipe, out)
    if notes:
        typer.echo("\n  ".join(["without a counterpart:", *notes]), err=True)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, or a Hugging Face folder.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; give it again for several at a time.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among so many most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the most likely tokens of this total share.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto: cuda if there is one, else cpu.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the matrix products; auto: bfloat16 where the device is fast at it, else float32."),
    ] = "auto",
) -> None:
    """Continue prompts with a trained model; a single one's text appears as it is generated."""
    from ternlm.config import ComputeConfig
    from ternlm.convert.fill import fill_model
    from ternlm.infer.sampling import SamplingParams
    from ternlm.infer.text import generate_texts, stop_ids, stream_text
    from ternlm.model.decoder import build_empty_model
    from ternlm.train.models import open_model
    from ternlm.train.precision import autocast, choose_device, choose_dtype

    opened = open_model(checkpoint)
    tokenizer = opened.tokenizer
    if tokenizer is None:
        _fail(f"{checkpoint}: has no tokenizer, without which a prompt can't be read; put a tokenizer.json there")
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_ids=stop_ids(tokenizer),
    )
    place = choose_device(device)
    model = build_empty_model(opened.config, place)
    fill_model(model, opened.weights)
    with autocast(place, choose_dtype(ComputeConfig(dtype=dtype), place)):
        if len(prompt) == 1:
            begun: list[str] = []  # the prompt is shown with the first piece, once nothing can be wrong with it

            def show(piece: str) -> None:
                typer.echo(piece if begun else prompt[0] + piece, nl=False)
                begun.append(piece)

            stream_text(model, tokenizer, prompt[0], params, show)
            typer.echo("" if begun else prompt[0])
            return
        for text, continuation in zip(prompt, generate_texts(model, tokenizer, prompt, params), strict=True):
            typer.echo(text + continuation)


@app.command("export")
def export_model(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, or a model of another format.")],
    to: Annotated[Literal["hf"], typer.Option(help="hf: a folder for transformers, vLLM, LMDeploy, ModelScope.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it mustn't exist.")],
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights; keep: as they are.")
    ] = "keep",
    rope: Annotated[
        Literal["keep", "none", "dynamic", "static-ntk", "yarn"],
        typer.Option(help="How to go past the trained length; static-ntk and yarn need --max-length."),
    ] = "keep",
    max_length: Annotated[int | None, typer.Option(help="Context to stretch to, in tokens.", min=1)] = None,
    shard_gb: Annotated[float, typer.Option(help="Largest file, in GB.", min=0.001)] = 5.0,
    chat: Annotated[
        Literal["internlm", "internlm2"] | None,
        typer.Option(help="The protocol that it was trained to chat with.", show_default="the model's own, if any"),
    ] = None,
) -> None:
    """Write a model for other programs."""
    from ternlm.convert.export_hf import export_hf
    from ternlm.data.chat import PROTOCOLS
    from ternlm.train.models import open_model

    protocol = PROTOCOLS[chat] if chat else None
    export_hf(open_model(checkpoint), out, dtype, rope, max_length, int(shard_gb * 10**9), protocol)
    typer.echo(f"{out}: a {to} model")


@app.command("import")
def import_foreign(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder of the Llama family, InternLM or InternLM2.")],
    out: Annotated[Path, typer.Option(help="Folder to write the checkpoint to; it mustn't exist.")],
) -> None:
    """Make a checkpoint of another program's model, for load.from, generate and export."""
    from ternlm.train.models import import_model

    model = import_model(source, out)
    typer.echo(f"{out}: a checkpoint of {model.config.num_params:,} parameters")


@data.command("tokenizer")
def train_tokenizer(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder to save the tokenizer in.")],
    vocab_size: Annotated[int, typer.Option(help="Number of tokens.")] = 32_000,
    format: Format = "auto",
    include: Include = "*",
    field: Field = "text",
    text_document: TextDocument = "file",
    on_error: OnError = "fail",
    sample_mb: Annotated[int, typer.Option(help="Text to learn from, evenly spread over all, in MB.", min=1)] = 256,
) -> None:
    """Train a byte-level BPE tokenizer on raw text."""
    from ternlm.data.train_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(
        inputs,
        vocab_size,
        out,
        format=format,
        include=include,
        field=field,
        text_document=text_document,
        on_error=on_error,
        sample_bytes=sample_mb * 10**6,
    )
    typer.echo(f"{out}: a tokenizer of {tokenizer.vocab_size:,} tokens")


@data.command("prepare")
def prepare_data(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, a sentencepiece .model, or a folder with one.")],
    out: Annotated[Path, typer.Option(help="Folder for the token shards; called again, it goes on where it was.")],
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="as many as cores")] = None,
    part: Annotated[str | None, typer.Option(help="i/n: do the i-th of n parts, one on each machine.")] = None,
    on_error: OnError = "fail",
    format: Format = "auto",
    include: Include = "*",
    field: Field = "text",
    text_document: TextDocument = "file",
    unit_bytes: Annotated[
        int | None, typer.Option(help="Input of one shard, in bytes.", show_default="by the size of it all")
    ] = None,
    bos: Annotated[bool, typer.Option(help="Begin each document with the tokenizer's bos, if it has one.")] = True,
    eos: Annotated[bool, typer.Option(help="End each document with the tokenizer's eos.")] = True,
) -> None:
    """Turn raw text into token shards."""
    from rich.console import Console

    from ternlm.data.prepare import prepare

    prepare(
        inputs,
        tokenizer,
        out,
        workers=workers,
        part=part,
        on_error=on_error,
        field=field,
        format=format,
        include=include,
        text_document=text_document,
        unit_bytes=unit_bytes,
        bos=bos,
        eos=eos,
        console=Console(),
    )


@data.command("inspect")
def inspect_data(
    path: Annotated[Path, typer.Argument(help="A prepared folder, or InternLM .bin files.")],
    documents: Annotated[int, typer.Option(help="How many to show, evenly spread.")] = 3,
    chars: Annotated[int, typer.Option(help="Characters of each to show, at most.")] = 600,
    tokenizer: Annotated[Path | None, typer.Option(help="To decode .bin files; prepared folders have theirs.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything; check checksums and ids.")] = False,
) -> None:
    """Show counts, shards and decoded documents."""
    from ternlm.data.inspect import inspect

    inspect(path, documents=documents, chars=chars, tokenizer=tokenizer, verify=verify)


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

    recipes = list_recipes()
    if not recipes:
        _fail("there is no folder `recipes` here; go to a checkout of TernLM, or to a folder that has one")
    for path in recipes:
        with path.open(encoding="utf-8") as file:
            typer.echo(f"{path}: {file.readline().lstrip('# ').strip()}")
