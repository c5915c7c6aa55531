"""The verbs of `tern data`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

data = typer.Typer(help="Turn raw text into tokens, and look at them.", no_args_is_help=True)

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
