"""Measure one training step on CPU: TernLM against Hugging Face Trainer, litgpt and TRL, interleaved.

    python benchmarks/train_cpu/run.py

installs the peers into their own environments, runs every configuration as its own process in rounds of alternating
order, and writes WORKLOAD.json and WORKLOAD.md after every one of them. Run it with the python that has TernLM, on
Linux.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from data import write_documents
from report import format_report
from workloads import CONFIGURATIONS, SGEMM, WORKLOADS, Job, Workload, resize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interleaved.environments import prepare_environment
from interleaved.figures import describe_hardware, write_result
from interleaved.processes import REPO, describe_commit, environment_of, order_of_round, run_process

PEERS = Path(__file__).resolve().parent / "peers"
log = logging.getLogger("train_cpu")


def main() -> int:
    """Run what the command line asks for; return 1 if a configuration failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parse_arguments()
    workloads = [chosen_workload(name, args) for name in args.workload or WORKLOADS]
    pythons = chosen_pythons(workloads, args.envs.expanduser())
    failed = False
    for workload in workloads:
        with tempfile.TemporaryDirectory(prefix="ternlm-bench-") as folder:
            result = measure(workload, pythons, Path(folder), args)
        failed |= any("error" in said for entry in result["rounds"] for said in entry.values())
        log.info("wrote %s", args.out / f"{workload.name}.md")
    return int(failed)


def measure(workload: Workload, pythons: dict[str, Path], folder: Path, args: argparse.Namespace) -> dict:
    """Run all rounds of one workload; its result is on disk after every process."""
    # Two batches beyond the steps' own: litgpt asks for one more, and reads a token past each row.
    num_rows = (args.warmup + args.steps + 2) * workload.batch
    if workload.mean_document is not None:
        num_rows = max(num_rows, 128)  # few documents would have another mean
    lengths = write_documents(workload, num_rows, folder)
    result = describe(workload, lengths, args)
    for index in range(args.rounds):
        entry: dict = {}
        result["rounds"].append(entry)
        for config in (SGEMM, *order_of_round(workload.configs, index)):
            job = make_job(workload, config, folder, args)
            entry[config] = run_job(job, pythons[config], folder, args.timeout)
            write_result(result, format_report(result), args.out)
    return result


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="One training step on CPU, against other libraries.")
    add = parser.add_argument
    add("--out", type=Path, default=REPO / "benchmarks/results/train_cpu", help="folder of the results")
    add("--rounds", type=int, default=3, help="times that every configuration runs")
    add("--workload", action="append", choices=list(WORKLOADS), help="may be given more than once; all")
    add("--peers", help="configurations to run, comma-separated; else the workload's own")
    add("--warmup", type=int, default=3, help="steps before the timed ones (compilation happens there)")
    add("--steps", type=int, default=5, help="timed steps")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of every process")
    add("--envs", type=Path, default=Path("~/.cache/ternlm-bench"), help="folder of the peers' environments")
    add("--timeout", type=float, default=3600, help="seconds before a process is ended")
    shape = parser.add_argument_group("shape", "changes to the workloads; results are titled as resized")
    for name in ("batch", "seq_len", "mean_document", "vocab_size", "hidden_size", "num_layers", "num_heads"):
        shape.add_argument("--" + name.replace("_", "-"), type=int)
    shape.add_argument("--intermediate-size", type=int)
    args = parser.parse_args()
    if min(args.rounds, args.warmup, args.steps, args.threads) < 1:
        parser.error("--rounds, --warmup, --steps and --threads must be at least 1")
    return args


def chosen_workload(name: str, args: argparse.Namespace) -> Workload:
    """Return the workload as the command line changes it."""
    workload = WORKLOADS[name]
    changes = {
        field: getattr(args, field)
        for field in ("batch", "seq_len", "vocab_size", "hidden_size", "num_layers", "num_heads")
    }
    changes["intermediate_size"] = args.intermediate_size
    if workload.mean_document is not None:
        changes["mean_document"] = args.mean_document
    configs = workload.configs
    if args.peers:
        asked = args.peers.split(",")
        unknown = [config for config in asked if config not in CONFIGURATIONS]
        if unknown:
            sys.exit(f"--peers: {unknown[0]!r} is not known; choose from {', '.join(CONFIGURATIONS)}")
        configs = tuple(config for config in asked if workload.can_run(config))
        if not configs:
            able = ", ".join(config for config in CONFIGURATIONS if workload.can_run(config))
            sys.exit(f"--peers: none of {args.peers} runs the workload {name}; choose from {able}")
    return replace(resize(workload, **changes), configs=configs)


def chosen_pythons(workloads: list[Workload], envs: Path) -> dict[str, Path]:
    """Return each configuration's python, making the environments that are missing."""
    configs = {SGEMM, *(config for workload in workloads for config in workload.configs)}
    pythons = {}
    for config in sorted(configs):
        environment = CONFIGURATIONS[config].environment
        pythons[config] = prepare_environment(environment, envs) if environment else Path(sys.executable)
    return pythons


def describe(workload: Workload, lengths: list[int], args: argparse.Namespace) -> dict:
    """Return what a result says before any of its rounds."""
    return {
        "benchmark": "train_cpu",
        "workload": workload.name,
        "title": workload.title,
        "date": time.strftime("%Y-%m-%d"),
        "commit": describe_commit(),
        "hardware": describe_hardware(args.threads),
        "settings": {"rounds": args.rounds, "warmup": args.warmup, "steps": args.steps},
        "shape": vars(workload.shape),
        "batch": workload.batch,
        "seq_len": workload.seq_len,
        "configs": list(workload.configs),
        "aim": None if workload.resized else asdict(workload.aim),
        "documents": len(lengths),
        "mean_document_tokens": sum(lengths) / len(lengths),
        "flops_per_token": workload.flops_per_token(lengths),
        "rounds": [],
    }


def make_job(workload: Workload, config: str, folder: Path, args: argparse.Namespace) -> Job:
    """Return what one process is to do."""
    return Job(
        config=config,
        shape=workload.shape,
        batch=workload.batch,
        seq_len=workload.seq_len,
        warmup=args.warmup,
        steps=args.steps,
        threads=args.threads,
        tokens=str(folder / "tokens.npy"),
        ends=str(folder / "ends.npy"),
        scratch=str(folder / "scratch"),
        packed=workload.mean_document is not None,
    )


def run_job(job: Job, python: Path, folder: Path, timeout: float) -> dict:
    """Run one configuration in a process of its own and return its result, or {"error": what it said last}."""
    configuration = CONFIGURATIONS[job.config]
    job.save(folder / "job.json")
    command = [str(python), str(PEERS / configuration.script), str(folder / "job.json")]
    environment = environment_of(job.config, job.threads, folder, with_ternlm=configuration.environment is None)
    if job.config == "litgpt-eager":
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return run_process(job.config, command, environment, Path(job.scratch), timeout)


if __name__ == "__main__":
    sys.exit(main())
