"""Other engines as `tern serve` starts them: what each reads, its command, its beginning and its end."""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import httpx

from ternlm.config.section import ConfigError, UserError
from ternlm.serve.address import bind

logger = logging.getLogger(__name__)

EngineName = Literal["llamacpp", "vllm", "lmdeploy", "sglang"]
FILES: Mapping[str, Literal["gguf", "hf"]] = {"llamacpp": "gguf", "vllm": "hf", "lmdeploy": "hf", "sglang": "hf"}
"""What each engine reads: a GGUF file or a Hugging Face folder."""
_PACKAGES = {"llamacpp": "xllamacpp", "vllm": "vllm", "lmdeploy": "lmdeploy", "sglang": "sglang"}
_PARSERS = {
    "vllm": {"internlm2": "internlm", "chatml": "hermes", "llama3": "llama3_json"},
    "lmdeploy": {"internlm2": "internlm", "chatml": "qwen", "llama3": "llama3"},
    "sglang": {"chatml": "qwen25", "llama3": "llama3"},
}
"""What engines call the ways in which tools are called, by the chat protocol."""
_TELL_SECONDS, _LOG_LINES = 30.0, 30
_RANKS = re.compile(r"--[\w.-]*parallel|-(tp|pp|dp)\b")
"""vLLM's options for several processes, each of which wants a list of cores of its own."""
_FEW_CORES = 4
"""Up to which vLLM is given all: left alone it keeps one for other things, which is half of two."""


@dataclass(frozen=True)
class Start:
    """How an engine is to serve a model."""

    engine: EngineName
    model: Path
    name: str
    """What clients call it."""
    python: str = sys.executable
    """Of the environment that the engine is installed in."""
    on_cpu: bool = False
    dtype: str = "auto"
    max_running: int = 64
    kv_tokens: int | None = None
    max_length: int | None = None
    """Tokens of a text at most; the model's own if not given."""
    protocol: str | None = None
    threads: int | None = None
    more: tuple[str, ...] = ()
    """Arguments for the engine's own command line, as they are."""

    def command(self, port: int) -> list[str]:
        """Return what starts it at a port of this machine."""
        return [*getattr(self, f"_{self.engine}")(str(port)), *self.more]

    def environment(self) -> dict[str, str]:
        """Return the variables that it needs beside those of this process."""
        found = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if self.engine == "vllm" and self.on_cpu:
            found |= {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
            cores, alone = _cores(), not any(map(_RANKS.match, self.more))
            if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ and len(cores) <= _FEW_CORES and alone:
                found |= {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
        return found

    def _llamacpp(self, port: str) -> list[str]:
        if self.more:
            raise ConfigError(f"--engine-args {' '.join(self.more)} has no effect on llamacpp; leave it out")
        settings = {
            "model": str(self.model),
            "name": self.name,
            "port": int(port),
            "texts": self.max_running,
            "tokens": self.kv_tokens,
            "threads": self.threads,
        }
        return [self.python, str(Path(__file__).with_name("llamacpp.py")), json.dumps(settings)]

    def _vllm(self, port: str) -> list[str]:
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--served-model-name", self.name, "--host", "127.0.0.1", "--port", port]
        command += ["--dtype", self.dtype, "--max-num-seqs", str(self.max_running)]
        if self.on_cpu:
            command.append("--enforce-eager")
        if self.max_length is not None:
            command += ["--max-model-len", str(self.max_length)]
        parser = self._parser()
        return [*command, "--enable-auto-tool-choice", "--tool-call-parser", parser] if parser else command

    def _lmdeploy(self, port: str) -> list[str]:
        command = [self.python, "-m", "lmdeploy", "serve", "api_server", str(self.model)]
        command += ["--server-name", "127.0.0.1", "--server-port", port, "--model-name", self.name]
        command += ["--max-batch-size", str(self.max_running)]
        if self.dtype in ("float16", "bfloat16"):
            command += ["--dtype", self.dtype]
        if self.max_length is not None:
            command += ["--session-len", str(self.max_length)]
        return [*command, "--tool-call-parser", self._parser()] if self._parser() else command

    def _sglang(self, port: str) -> list[str]:
        command = [self.python, "-m", "sglang.launch_server", "--model-path", str(self.model)]
        command += ["--served-model-name", self.name, "--host", "127.0.0.1", "--port", port]
        command += ["--dtype", self.dtype, "--max-running-requests", str(self.max_running)]
        if self.on_cpu:
            command += ["--device", "cpu"]
        if self.max_length is not None:
            command += ["--context-length", str(self.max_length)]
        return [*command, "--tool-call-parser", self._parser()] if self._parser() else command

    def _parser(self) -> str:
        return _PARSERS[self.engine].get(self.protocol or "", "")


def _cores() -> list[int]:
    """Return the numbers of the processor's cores that this process may use."""
    found = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return sorted(found)


def check_installed(engine: EngineName, python: str) -> None:
    """Raise ConfigError where an engine isn't in a Python's environment."""
    package = _PACKAGES[engine]
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        done = subprocess.run([python, "-c", look], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"--engine-python {python} can't be run ({error}); name the environment's python") from error
    if done.returncode:
        raise ConfigError(
            f"--engine {engine} needs the package {package}, which {python} doesn't have: pip install {package} there, "
            "or name an environment that has it: --engine-python PATH"
        )


class Process:
    """An engine's process, with those that it starts. It ends with this one, however that ends."""

    def __init__(self, start: Start) -> None:
        """Start it at a free port of this machine; `wait` says when it serves."""
        with bind("127.0.0.1", 0) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(Path(__file__).with_name("keeper.py")), *start.command(port)]
        logger.info("starting %s", " ".join(command[2:]))
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        environment = {**os.environ, **start.environment()}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, env=environment
        )

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def wait(self, seconds: float) -> None:
        """Wait until it serves. Raises UserError with what it said where it ends, or takes longer."""
        began, told = time.monotonic(), 0.0
        while not self._answers():
            passed = time.monotonic() - began
            if not self.is_alive:
                raise UserError(f"the engine ended before it served; it said:\n{self.said()}")
            if passed > seconds:
                self.end()
                raise UserError(
                    f"the engine didn't serve within {seconds:g} s (--start-seconds); it said:\n{self.said()}"
                )
            if passed - told > _TELL_SECONDS:
                told = passed
                logger.info("the engine is starting, for %d s now", passed)
            time.sleep(0.2)

    def said(self) -> str:
        """Return the last lines of what it printed."""
        self._log.flush()
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(size - 20000, 0))
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-_LOG_LINES:])

    def end(self) -> None:
        """End it, and wait until it has."""
        if self._process.stdin is not None:
            self._process.stdin.close()  # which the keeper waits for
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False
