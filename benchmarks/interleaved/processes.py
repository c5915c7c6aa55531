"""Configurations measured one after another, each in a process of its own, in rounds of alternating order."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# The measured processes import what they share from that folder; PREFIX is how their result is found.
sys.path.insert(0, str(Path(__file__).resolve().parent / "measured"))
from steps import PREFIX

MEASURED = Path(__file__).resolve().parent / "measured"
REPO = Path(__file__).resolve().parents[2]
log = logging.getLogger("interleaved")


def order_of_round(configs: tuple[str, ...], index: int) -> tuple[str, ...]:
    """Return the round's order: every second one is reversed, so that no one always runs on the warmer machine."""
    return tuple(reversed(configs)) if index % 2 else configs


def describe_commit() -> str:
    """Return the repository's commit, marked where files differ from it."""
    said = subprocess.run(["git", "-C", str(REPO), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def environment_of(name: str, threads: int, folder: Path, with_ternlm: bool) -> dict[str, str]:
    """Return a process's environment variables: threads, no GPU, no network, caches of its own."""
    given = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor" / name),
        "PYTHONPATH": os.pathsep.join([str(MEASURED), *([str(REPO)] if with_ternlm else [])]),
    }
    return {**os.environ, **given}


def run_process(name: str, command: list[str], environment: dict[str, str], scratch: Path, timeout: float) -> dict:
    """Run one configuration, in `scratch`, and return its result, or {"error": what it said last}."""
    scratch.mkdir()
    start = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, timeout=timeout)
        said, output, failed = done.stderr, done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired:
        said, output, failed = f"ended after {timeout:g} seconds", "", True
    finally:
        shutil.rmtree(scratch)
    found = [line for line in output.splitlines() if line.startswith(PREFIX)]
    if failed or len(found) != 1:
        log.error("%s failed:\n%s", name, said[-4000:])
        last = (said.strip().splitlines() or ["no result was printed"])[-1]
        return {"name": name, "error": last}
    result = json.loads(found[0].removeprefix(PREFIX))
    log.debug("%s said:\n%s", name, said)
    speed = result.get("tokens_per_s") or result["flops_per_s"] / 1e9
    unit = "tokens/s" if "tokens_per_s" in result else "GFLOP/s"
    log.info("%-14s %8.1f %s (process: %.0f s)", name, speed, unit, time.monotonic() - start)
    return result
