"""The verbs of `tern data`."""

from pathlib import Path
from typing import Annotated, Any, Literal

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

Chat = Annotated[
    str | None,
    typer.Option(
        help="The files hold conversations, for this protocol: internlm, internlm2, chatml, llama3, auto (by the "
        "tokenizer), or a file of a Jinja template."
    ),
]
Conversations = Annotated[
    Literal["auto", "messages", "sharegpt", "alpaca", "pairs", "text", "internlm"],
    typer.Option(help="With --chat: what a record is; auto: by its fields."),
]
System = Annotated[str | None, typer.Option(help="With --chat: system message of conversations that have none.")]


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
    chat: Chat = None,
    conversations: Conversations = "auto",
    system: System = None,
) -> None:
    """Turn raw text, or with --chat conversations, into token shards."""
    from rich.console import Console

    from ternlm.data.prepare import prepare

    its, options = _conversations(tokenizer, chat, conversations, system)
    prepare(
        inputs,
        its,
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
        conversations=options,
        console=Console(),
    )


@data.command("inspect")
def inspect_data(
    path: Annotated[
        Path, typer.Argument(help="A prepared folder, InternLM .bin files, or conversations (with --chat).")
    ],
    documents: Annotated[int, typer.Option(help="How many to show, evenly spread.")] = 3,
    chars: Annotated[int, typer.Option(help="Characters of each to show, at most.")] = 600,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Of .bin files and conversations; prepared folders have theirs.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything; check checksums and ids.")] = False,
    seq_len: Annotated[int | None, typer.Option(help="Tell what sequences of so many tokens cut off.", min=1)] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Put [[ ]] around what is trained.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer and chat protocol conversations are for.")
    ] = None,
    chat: Chat = None,
    conversations: Conversations = "auto",
    system: System = None,
    records: Annotated[int, typer.Option(help="Conversations of each file to look at.", min=1)] = 2000,
) -> None:
    """Show counts, shards and decoded documents; or what conversations become, before they are prepared."""
    from ternlm.data.inspect import inspect
    from ternlm.data.inspect_chat import inspect_conversations

    if model is not None:
        its, options = _for_model(model, chat or "auto", conversations, system)
    elif chat is None:
        inspect(
            path,
            documents=documents,
            chars=chars,
            tokenizer=tokenizer,
            verify=verify,
            seq_len=seq_len,
            plain=plain,
        )
        return
    elif tokenizer is None:
        raise typer.BadParameter("conversations need one, or --model", param_hint="--tokenizer")
    else:
        its, options = _conversations(tokenizer, chat, conversations, system)
    inspect_conversations(
        path, its, options, documents=documents, chars=chars, records=records, seq_len=seq_len, plain=plain
    )


def _conversations(tokenizer: Path, chat: str | None, format: Any, system: str | None) -> Any:
    """Find how conversations become tokens: (Tokenizer, ConversationOptions); without a protocol (tokenizer, None)."""
    from ternlm.data.protocols import protocol_for, read_template
    from ternlm.data.samples import options_for
    from ternlm.data.tokenizer import load_tokenizer

    if chat is None:
        if format != "auto" or system is not None:
            raise typer.BadParameter("name the chat protocol too", param_hint="--chat")
        return tokenizer, None
    its = load_tokenizer(tokenizer)
    protocol = protocol_for(chat, its, read_template(tokenizer))
    return protocol.fit(its), options_for(protocol, format, system)


def _for_model(model: str, chat: str, format: Any, system: str | None) -> Any:
    """Find how conversations become a model's tokens: (Tokenizer, ConversationOptions)."""
    from ternlm.config import ConfigError
    from ternlm.data.samples import options_for
    from ternlm.infer.chat import protocol_of
    from ternlm.train.models import open_model

    opened = open_model(model)
    if opened.tokenizer is None:
        raise ConfigError(f"{opened.path}: has no tokenizer; name one by --tokenizer, and the protocol by --chat")
    protocol = protocol_of(opened, opened.tokenizer, chat)
    return protocol.fit(opened.tokenizer), options_for(protocol, format, system)
