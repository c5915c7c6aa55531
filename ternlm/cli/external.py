"""`tern serve` by an engine that isn't TernLM's: a model in a form that it reads, its process, and its end."""

import logging
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer


@dataclass(frozen=True)
class External:
    """What `tern serve` was told, for another engine."""

    engine: Any
    model: str
    base: str | None
    name: str
    device: str
    dtype: str
    protocol: str | None
    python: str | None
    arguments: list[str] | None
    kv_tokens: int | None
    max_running: int

    def start(self, model: Path) -> Any:
        """Return how the engine serves a model in a form that it reads, as `Start`."""
        from ternlm.serve.external import Start
        from ternlm.train.precision import choose_device

        if self.engine != "llamacpp":
            refuse(self.engine, {"--kv-tokens": (self.kv_tokens, None)})
        return Start(
            engine=self.engine,
            model=model,
            name=self.name,
            python=self.python or sys.executable,
            on_cpu=choose_device(self.device).type == "cpu",
            dtype=self.dtype,
            max_running=self.max_running,
            kv_tokens=self.kv_tokens,
            protocol=self.protocol,
            more=self.words(),
        )

    def words(self) -> tuple[str, ...]:
        """Return the arguments for the engine's command. Raises ConfigError where quotes don't match."""
        import shlex

        from ternlm.config.section import ConfigError

        try:
            return tuple(part for text in self.arguments or [] for part in shlex.split(text))
        except ValueError as error:
            raise ConfigError(f"--engine-args {self.arguments} can't be read ({error}); mend the quotes") from error


def refuse(engine: str, given: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise ConfigError for options, by name with their value and their default, that an engine doesn't take."""
    from ternlm.config.section import ConfigError

    for option, (value, default) in given.items():
        if value != default:
            told = value if isinstance(value, (str, int, float)) else " ".join(value)
            raise ConfigError(f"{option} {told} has no effect with --engine {engine}; leave it out")


def serve_external(external: External, bound: Any, rules: Any, max_open: int, grace: float, seconds: float) -> None:
    """Serve a model by another engine until a signal comes.

    bound: the port, taken. rules: `Rules`. max_open: requests at the same time at most. seconds: that the engine may
    take to start.
    """
    from ternlm.serve.external import Process, check_installed
    from ternlm.serve.guard import Gate
    from ternlm.serve.proxy import Proxy, make_proxy_app
    from ternlm.serve.run import run

    external.words()  # before anything is written
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was written until it serves is taken away
    check_installed(external.engine, external.python or sys.executable)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else each look whether the engine serves is a line
    with readable_model(external) as path:
        process = Process(external.start(path))
        try:
            process.wait(seconds)
            proxy, gate = Proxy(process, max_open), Gate()

            def announce(url: str) -> None:
                typer.echo(f"{url}/v1 serves {external.name} by {external.engine}")
                sys.stdout.flush()  # who started this in a pipe waits for it

            run(make_proxy_app(proxy, rules, gate), proxy, gate, bound, grace, announce)
        finally:
            process.end()


@contextmanager
def readable_model(external: External) -> Iterator[Path]:
    """Give the model in a form that its engine reads: as it is, or written to a folder for the while."""
    from ternlm.convert.detect import find_model
    from ternlm.data.protocols import PROTOCOLS
    from ternlm.serve.external import FILES
    from ternlm.train.models import open_model

    form, path = FILES[external.engine], find_model(external.model)
    is_readable = path.suffix == ".gguf"
    if form == "hf":
        is_readable = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    if is_readable and (external.base, external.protocol, external.dtype) == (None, None, "auto"):
        yield path
        return
    chat = PROTOCOLS[external.protocol] if external.protocol else None
    dtype = "keep" if external.dtype == "auto" else external.dtype
    with tempfile.TemporaryDirectory(prefix="ternlm-serve-") as folder:
        out, opened = (
            Path(folder) / ("model.gguf" if form == "gguf" else "model"),
            open_model(external.model, external.base),
        )
        if form == "gguf":
            from ternlm.convert.gguf_write import export_gguf

            export_gguf(opened, out, dtype, chat=chat)
        else:
            from ternlm.convert.export_hf import export_hf

            export_hf(opened, out, dtype, chat=chat)
        yield out
