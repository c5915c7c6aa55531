"""Measure TernLM's training step on one GPU: InternLM-7B-shaped layers, as many as fit, in bfloat16.

    python benchmarks/train_gpu/run.py

writes train_gpu.json and train_gpu.md: tokens/s, TFLOPS, MFU (attention in full, and causal) and a profile that names
where the rest of the step goes. Without a GPU it runs a tiny shape on the CPU, which shows only that it works.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from job import OUT_OF_MEMORY, PREFIX, Job

REPO = Path(__file__).resolve().parents[2]
MEASURE = Path(__file__).resolve().with_name("measure.py")

AIM_MFU = 0.52
"""On an H100, with attention counted in full."""
log = logging.getLogger("train_gpu")


def main() -> int:
    """Run what the command line asks for and write the results."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args, job = parse_arguments()
    result = run_job(job) if job.layers else run_largest(job)
    if result is None:
        log.error("%d layers don't fit in the device's memory; take fewer, or a smaller --microbatch", job.layers)
        return 1
    result["date"] = time.strftime("%Y-%m-%d")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "train_gpu.md").write_text(format_report(result))
    log.info("wrote %s", args.out / "train_gpu.md")
    return 0


def parse_arguments() -> tuple[argparse.Namespace, Job]:
    """Read the command line; defaults depend on whether there is a GPU."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="One training step on a GPU.")
    add = parser.add_argument
    add("--out", type=Path, default=REPO / "benchmarks/results/train_gpu", help="folder of the results")
    add("--device", default="cuda" if gpu else "cpu")
    add("--preset", default="internlm-7b" if gpu else "tiny", help="shape of the layers and the vocabulary")
    add("--layers", type=int, default=0 if gpu else 2, help="number of layers; 0: as many as fit")
    add("--dtype", default="bfloat16" if gpu else "float32")
    add("--seq-len", type=int, default=2048 if gpu else 64)
    add("--microbatch", type=int, default=4 if gpu else 2, help="sequences in one forward and backward")
    add("--accumulate", type=int, default=4 if gpu else 1, help="microbatches a step")
    add("--recompute", type=float, default=0.0, help="share of the layers that recompute activations")
    add("--recompute-keep", default="nothing", choices=("nothing", "matmuls"))
    add("--compile", default="auto", choices=("auto", "on", "off"), help="compile each block")
    add("--warmup", type=int, default=5 if gpu else 1)
    add("--steps", type=int, default=10 if gpu else 2, help="timed steps")
    add("--profiled", type=int, default=2 if gpu else 1, help="steps under the profiler, after the timed ones")
    args = parser.parse_args()
    if args.warmup < 1 or args.steps < 1:
        parser.error("--warmup and --steps must be at least 1")
    if not args.layers and args.device == "cpu":
        parser.error("--layers 0 (as many as fit) needs a GPU; give a number")
    fields = {name: getattr(args, name) for name in Job.__dataclass_fields__ if name != "scratch"}
    return args, Job(**fields, scratch="")


def run_largest(job: Job) -> dict | None:
    """Measure with the largest number of layers that fits; None where not even one does.

    Memory with one and two layers gives the slope; then the guess and, as long as it doesn't fit, one layer less.
    """
    brief = replace(job, warmup=1, steps=1, profiled=0)
    one, two = (run_job(replace(brief, layers=layers)) for layers in (1, 2))
    if one is None or two is None:
        return None
    free = torch.cuda.get_device_properties(0).total_memory * 0.96
    slope = two["peak_memory_bytes"] - one["peak_memory_bytes"]
    layers = max(2, int((free - one["peak_memory_bytes"]) / slope) + 1)
    log.info("a layer takes %.2f GiB; trying %d", slope / 2**30, layers)
    while layers > 2:
        result = run_job(replace(job, layers=layers))
        if result is not None:
            return result
        log.info("%d layers don't fit", layers)
        layers -= 1
    return run_job(replace(job, layers=2))


def run_job(job: Job) -> dict | None:
    """Run one process and return its result; None if it ran out of the device's memory."""
    with tempfile.TemporaryDirectory(prefix="ternlm-bench-") as folder:
        scratch = Path(folder) / "scratch"
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(asdict(replace(job, scratch=str(scratch)))))
        # Layers come and go in sizes of many kinds: without this, gaps between blocks waste memory.
        settings = {"PYTHONPATH": str(REPO), "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        done = subprocess.run(
            [sys.executable, str(MEASURE), str(file)],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
        )
    if done.returncode == OUT_OF_MEMORY:
        return None
    if done.returncode:
        sys.exit(f"measuring {job.layers} layers failed:\n{done.stderr[-4000:]}")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(PREFIX)]
    result: dict = json.loads(line.removeprefix(PREFIX))
    log.info("%d layers: %.0f tokens/s, MFU %.1f%%", job.layers, result["tokens_per_s"], 100 * result["mfu_full"])
    return result


def format_report(result: dict) -> str:
    """Return the report in Markdown."""
    job = result["job"]
    lines = [
        "# One training step on a GPU",
        "",
        f"{result['date']}; {result['device']}, torch {result['torch']}; {job['layers']} layers of {job['preset']} "
        f"with its embedding and head ({result['num_params'] / 1e6:,.1f} M parameters), {job['dtype']}; "
        f"{job['microbatch']} x {job['seq_len']} tokens a microbatch, {job['accumulate']} microbatches a step; "
        f"recompute {job['recompute']:g} (keeps {job['recompute_keep']}), compile {job['compile']}.",
        "",
        "| tokens/s | step, s (median) | TFLOPS, full / causal / hardware | MFU, full / causal / hardware "
        "| peak memory, GiB |",
        "|---|---|---|---|---|",
        f"| {result['tokens_per_s']:.0f} | {statistics.median(result['step_seconds']):.3f} "
        f"| {_three(result, 'tflops', 1, '.3g')} | {_three(result, 'mfu', 100, '.1f')} % "
        f"| {result['peak_memory_bytes'] / 2**30:.1f} |",
        "",
        f"MFU is against {result['peak_tflops']:.4g} TFLOPS ({result['peak_source']}). Full counts all of attention "
        "(as Megatron-LM and InternLM do), causal half of it, hardware what is recomputed too. "
        f"Loss from {result['losses'][0]:.3f} to {result['losses'][-1]:.3f}.",
        "",
    ]
    if "H100" in result["device"]:
        met = "met" if result["mfu_full"] >= AIM_MFU else "**not met**"
        lines += [f"Aim, {AIM_MFU:.0%} MFU with attention in full: {met}.", ""]
    return "\n".join(lines + (_format_profile(result) if "profile" in result else []))


def _format_profile(result: dict) -> list[str]:
    profile = result["profile"]
    step = profile["step_ms"]
    ideal = statistics.median(result["step_seconds"]) * 1e3 * result["mfu_full"]
    lines = [
        "## Where the time goes",
        "",
        f"A profiled step takes {step:.1f} ms; at the device's peak its FLOPs would take {ideal:.1f} ms.",
        "",
        "| kind of work | ms a step | % |",
        "|---|---|---|",
        *(f"| {kind} | {ms:.2f} | {100 * ms / step:.1f} |" for kind, ms in profile["kinds_ms"].items()),
    ]
    if profile["idle_ms"] is not None:
        lines.append(f"| the device idle | {profile['idle_ms']:.2f} | {100 * profile['idle_ms'] / step:.1f} |")
    lines += ["", "| region (all kinds of work in it) | ms a step |", "|---|---|"]
    lines += [f"| {name} | {ms:.2f} |" for name, ms in profile["regions_ms"].items()]
    lines += ["", "| longest kernels or operators | ms a step | calls a step |", "|---|---|---|"]
    lines += [f"| `{entry['name'][:100]}` | {entry['ms']:.2f} | {entry['calls']:g} |" for entry in profile["longest"]]
    return [*lines, ""]


def _three(result: dict, name: str, scale: float, form: str) -> str:
    return " / ".join(format(result[f"{name}_{kind}"] * scale, form) for kind in ("full", "causal", "hardware"))


if __name__ == "__main__":
    sys.exit(main())
