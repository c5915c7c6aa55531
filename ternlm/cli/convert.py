"""The verbs that take models from other programs and give them to others."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ternlm.cli.options import Base, Model


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


def export_model(
    model: Model,
    to: Annotated[
        Literal["hf", "gguf", "peft"],
        typer.Option(
            help="hf: a folder for transformers, vLLM, LMDeploy, ModelScope; gguf: a file for llama.cpp; peft: the "
            "adapter of a run that trained one, alone."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder or file to write; it mustn't exist.")],
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the weights; keep: as they are, in gguf float16."),
    ] = "keep",
    rope: Annotated[
        Literal["keep", "none", "dynamic", "static-ntk", "yarn"],
        typer.Option(help="How to go past the trained length; static-ntk and yarn need --max-length."),
    ] = "keep",
    max_length: Annotated[int | None, typer.Option(help="Context to stretch to, in tokens.", min=1)] = None,
    shard_gb: Annotated[float, typer.Option(help="Largest file, in GB.", min=0.001)] = 5.0,
    chat: Annotated[
        Literal["internlm", "internlm2", "chatml", "llama3"] | None,
        typer.Option(help="The protocol that it was trained to chat with.", show_default="the model's own, if any"),
    ] = None,
    base: Base = None,
) -> None:
    """Write a model for other programs."""
    from ternlm.convert.export_hf import export_hf
    from ternlm.convert.gguf_write import export_gguf
    from ternlm.data.chat import PROTOCOLS
    from ternlm.train.models import open_adapter, open_model

    if to == "peft":
        from ternlm.convert.peft import write_adapter

        adapter = open_adapter(model)
        write_adapter(adapter, out)
        if adapter.config.base == "nf4":
            typer.echo("note: it was trained beside weights in 4 bits; load the model in 4 bits (nf4), too", err=True)
        typer.echo(f"{out}: an adapter")
        return
    opened, protocol = open_model(model, base), PROTOCOLS[chat] if chat else None
    if to == "hf":
        export_hf(opened, out, dtype, rope, max_length, int(shard_gb * 10**9), protocol)
    else:
        export_gguf(opened, out, dtype, rope, max_length, protocol)
    typer.echo(f"{out}: a {to} model")


def merge_adapter(
    adapter: Annotated[str, typer.Argument(help="A run or checkpoint of adapters, or a folder of PEFT's.")],
    out: Annotated[Path, typer.Option(help="Hugging Face folder to write; it mustn't exist.")],
    base: Base = None,
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the weights; keep: those of the model that the adapters belong to."),
    ] = "keep",
) -> None:
    """Put adapters into the model that they belong to."""
    from ternlm.convert.export_hf import export_hf
    from ternlm.train.models import open_adapter, open_model

    open_adapter(adapter)  # refuses what has none
    export_hf(open_model(adapter, base), out, dtype)
    typer.echo(f"{out}: a model with its adapters put in")


def import_foreign(
    source: Annotated[
        str,
        typer.Argument(help="A Hugging Face folder, a GGUF file, smollm2, or InternLM's own checkpoint."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the checkpoint to; it mustn't exist.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json or .model, or a folder with one.", show_default="the source's")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, where a checkpoint of InternLM's doesn't tell.", min=1)
    ] = None,
    norms: Annotated[
        Literal["equal", "mean"],
        typer.Option(help="Where its tensor-parallel ranks have different norms: refuse, or mean."),
    ] = "equal",
) -> None:
    """Make a checkpoint of another program's model, for load.from, generate and export."""
    from ternlm.train.models import import_model

    model = import_model(source, out, tokenizer, heads, norms)
    typer.echo(f"{out}: a checkpoint of {model.config.num_params:,} parameters")
