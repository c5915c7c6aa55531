"""The verbs of `tern bench`."""

import json
import logging
import math
from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(help="Measure.", no_args_is_help=True)


@bench.callback()
def measure() -> None:
    """Measure."""  # a callback keeps `serve` a verb of its own as long as it is the only one


@bench.command("serve")
def bench_serve(
    url: Annotated[str, typer.Argument(help="An OpenAI-compatible server, as http://127.0.0.1:8000")],
    model: Annotated[str | None, typer.Option(help="Its model.", show_default="the first that it names")] = None,
    api_key: Annotated[str | None, typer.Option(help="Its key.", envvar="TERNLM_API_KEY", show_default="none")] = None,
    requests: Annotated[int, typer.Option(help="Requests in all.", min=1)] = 100,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, at random moments.", show_default="no waiting")
    ] = None,
    clients: Annotated[
        int | None, typer.Option(help="Requests at the same time at most.", min=1, show_default="any number")
    ] = None,
    prompt_words: Annotated[tuple[int, int], typer.Option(help="Fewest and most words of a prompt.")] = (32, 256),
    output_tokens: Annotated[tuple[int, int], typer.Option(help="Fewest and most tokens of an answer.")] = (32, 128),
    shared_words: Annotated[int, typer.Option(help="Words that all prompts begin with.")] = 0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Let answers be as long as is asked, where the server knows ignore_eos.")
    ] = True,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests at the same moments.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the figures there, as JSON.")] = None,
) -> None:
    """Measure a server under load: time to first token, time per token, requests and tokens a second."""
    import asyncio

    from ternlm.config.section import ConfigError

    try:
        from ternlm.serve.load import Mix, draw, format_report, run_load
    except ImportError as error:
        raise ConfigError(f"tern bench serve needs {error.name}; pip install 'ternlm[serve]'") from error
    if rate is not None and not 0 < rate < math.inf:
        raise ConfigError(f"--rate {rate} must be above 0")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"--out {out} must be a file in a folder that is there; make {out.parent} or name another")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else each request is a line
    asked = draw(requests, Mix(prompt_words, output_tokens, shared_words), seed)
    report, _ = asyncio.run(
        run_load(
            url.rstrip("/").removesuffix("/v1"),
            asked,
            model=model,
            api_key=api_key,
            rate=rate or math.inf,
            clients=clients,
            seed=seed,
            extra={"ignore_eos": True} if ignore_eos else None,
        )
    )
    typer.echo(format_report(report))
    if out is not None:
        out.write_text(json.dumps(report.to_json(), indent=1) + "\n", "utf-8")
    if report.failed == report.requests:
        raise typer.Exit(1)
