"""The verb `tern serve`."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ternlm.cli.models import ready, room_for
from ternlm.cli.options import Base, Device, Dtype, Model

Host = Annotated[str, typer.Option(help="Address to listen at; others than this machine's need a key.")]
Port = Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)]
Key = Annotated[
    str | None, typer.Option(help="Key that requests must bring.", envvar="TERNLM_API_KEY", show_default="none")
]
Name = Annotated[str | None, typer.Option(help="What clients call the model.", show_default="its folder's or file's")]
Protocol = Annotated[
    Literal["internlm", "internlm2", "chatml", "llama3"] | None,
    typer.Option(help="How it was trained to chat.", show_default="the model's own"),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens whose keys and values are kept, in memory that is taken at the start.",
        min=16,
        show_default="from the free memory, taken as it comes to be needed",
    ),
]
Running = Annotated[int, typer.Option(help="Texts that are continued at the same time.", min=1)]
Step = Annotated[int, typer.Option(help="Tokens of a forward pass.", min=1)]
Waiting = Annotated[int, typer.Option(help="Texts that wait beyond those; more are refused.", min=0)]
Body = Annotated[float, typer.Option(help="Largest body of a request, in MiB.", min=0.001)]
Grace = Annotated[float, typer.Option(help="Seconds that answers have to end, once it is stopped.", min=0)]
Log = Annotated[bool, typer.Option(help="Log a line for each request; never what it says.")]
EngineName = Annotated[
    Literal["torch", "llamacpp", "vllm", "lmdeploy", "sglang"],
    typer.Option(help="torch: TernLM's own; another one is started, waited for and stood before."),
]
Python = Annotated[
    str | None, typer.Option(help="Python of another engine's environment.", show_default="the one that runs this")
]
Arguments = Annotated[
    list[str] | None, typer.Option(help="Arguments for another engine's own command line, as one text.")
]
Start = Annotated[float, typer.Option(help="Seconds that another engine may take to start.", min=1)]


def serve(
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Key = None,
    name: Name = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    base: Base = None,
    protocol: Protocol = None,
    kv_tokens: Tokens = None,
    max_running: Running = 64,
    max_step_tokens: Step = 512,
    max_waiting: Waiting = 256,
    max_body_mib: Body = 4.0,
    grace: Grace = 30.0,
    log_requests: Log = False,
    engine: EngineName = "torch",
    engine_python: Python = None,
    engine_args: Arguments = None,
    start_seconds: Start = 900.0,
) -> None:
    """Serve a model by OpenAI's HTTP interface. The port opens once the model is loaded."""
    from ternlm.config.section import ConfigError
    from ternlm.serve.address import bind, check_host, is_local

    for option, number in (("--max-body-mib", max_body_mib), ("--grace", grace), ("--start-seconds", start_seconds)):
        if not number < math.inf:  # NaN neither
            raise ConfigError(f"{option} {number} must be a finite number; give one, or leave it out")
    check_host(host, api_key)
    bound = bind(host, port)
    try:
        from ternlm.serve.guard import Rules
    except ImportError as error:
        raise ConfigError(f"tern serve needs {error.name}; pip install 'ternlm[serve]'") from error
    rules = Rules(api_key, int(max_body_mib * 2**20), api_key is None and is_local(host), log_requests)
    named, most = name or Path(model).stem, max_running + max_waiting
    from ternlm.cli.external import External, refuse, serve_external

    if engine == "torch":
        others = {"--engine-python": (engine_python, None), "--engine-args": (engine_args, None)}
        refuse(engine, others | {"--start-seconds": (start_seconds, 900.0)})
        with _own_engine(model, device, dtype, base, kv_tokens, max_running, max_step_tokens) as (opened, own, home):
            _serve_own(opened, own, home, named, protocol, max_waiting, rules, bound, grace)
        return
    external = External(
        engine, model, base, named, device, dtype, protocol, engine_python, engine_args, kv_tokens, max_running
    )
    refuse(engine, {"--max-step-tokens": (max_step_tokens, 512)})
    serve_external(external, bound, rules, most, grace, start_seconds)


def _serve_own(
    opened: Any,
    engine: Any,
    home: Any,
    name: str,
    protocol: str | None,
    max_waiting: int,
    rules: Any,
    bound: Any,
    grace: float,
) -> None:
    """Serve by TernLM's engine."""
    from ternlm.serve.app import make_app
    from ternlm.serve.guard import Gate
    from ternlm.serve.run import run
    from ternlm.serve.torch_engine import TorchBackend

    served = _describe(name, opened, engine, protocol, engine.scheduler.max_running + max_waiting)
    backend, gate = TorchBackend(engine, served.tokenizer, max_waiting=max_waiting, home=home), Gate()

    def announce(url: str) -> None:
        chat = "" if served.dialect else f"; no chat: {served.why_not}"
        typer.echo(f"{url}/v1 serves {served.name}, texts of up to {served.max_tokens:,} tokens{chat}")
        sys.stdout.flush()  # who started this in a pipe waits for it

    run(make_app(served, backend, rules, gate), backend, gate, bound, grace, announce)


@contextmanager
def _own_engine(
    model: str,
    device: str,
    dtype: str,
    base: str | None,
    kv_tokens: int | None,
    max_running: int,
    max_step_tokens: int,
) -> Iterator[tuple[Any, Any, Any]]:
    """Give a loaded model, its engine, and the thread that both were made in and that steps are to run in."""
    from ternlm.infer.worker import Home

    def make(network: Any) -> Any:
        from ternlm.infer.engine import Engine

        num_tokens = room_for(network, max_running, kv_tokens)
        engine = Engine(network, num_tokens, max_running=max_running, max_step_tokens=max_step_tokens)
        if kv_tokens is not None:  # what was asked for is taken at once; else as much of it as comes to be needed
            engine.reserve()
        return engine

    home, held = Home(), ExitStack()
    try:
        opened, network = home.do(lambda: held.enter_context(ready(model, device, dtype, base)))
        engine = home.do(lambda: make(network))
    except KeyboardInterrupt:
        os._exit(130)  # a normal end, beside a thread that is in the middle of loading, would abort
    try:
        yield opened, engine, home
    finally:
        home.do(held.close)
        home.end()


def _describe(name: str, opened: Any, engine: Any, protocol: str | None, max_jobs: int) -> Any:
    """Return what the front end knows of a model; one that can't chat is served for all else, unless told how to."""
    from ternlm.infer.chat import NoDialect, find_dialect, told_ends
    from ternlm.infer.text import stop_ids
    from ternlm.serve.backend import ServedModel

    dialect, why_not, tokenizer = None, "", opened.tokenizer
    try:
        dialect = find_dialect(opened, protocol)
        tokenizer = dialect.tokenizer
    except NoDialect as error:
        if protocol is not None:
            raise
        why_not = str(error)
    assert tokenizer is not None  # `loaded` has seen to it
    told = {end for end in told_ends(opened.facts) if 0 <= end < engine.config.vocab_size}
    return ServedModel(
        name=name,
        created=int(time.time()),
        tokenizer=tokenizer,
        vocab_size=engine.config.vocab_size,
        max_tokens=engine.longest,
        max_jobs=max_jobs,
        stop_ids=stop_ids(tokenizer) | told,
        dialect=dialect,
        why_not=why_not,
    )
