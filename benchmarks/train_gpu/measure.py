"""One process of the GPU benchmark: train through TernLM's public path, then profile, and print one JSON line.

The model has one long document a row, so attention is causal over the whole sequence. Ids are random: they cost what
text costs. `run.py` starts this and reads its line.
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from breakdown import describe_profile, make_profiler
from job import OUT_OF_MEMORY, PREFIX, Job

from ternlm.config import Config
from ternlm.config.model import PRESETS
from ternlm.data.batch import Batch
from ternlm.data.shards import ShardWriter, write_manifest
from ternlm.data.tokenizer import train_bpe
from ternlm.model.decoder import Head
from ternlm.monitor.memory import peak_memory
from ternlm.monitor.peak import device_peak
from ternlm.planner.flops import training_flops_per_token
from ternlm.train.loop import train_loop
from ternlm.train.objective import Loss, LossFn
from ternlm.train.report import Reporter
from ternlm.train.run import Run, set_up


class Watch:
    """A sink that notes when each step ended and runs the profiler over the last ones."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job = job
        self.device = device
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.profiler = make_profiler(device)
        self.profiled_seconds = 0.0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        job = self.job
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())
        self.losses.append(metrics["loss/total"])
        if job.profiled and step == job.warmup + job.steps:
            self.profiler.start()
        if job.profiled and step == job.warmup + job.steps + job.profiled:
            self.profiled_seconds = (time.perf_counter() - self.ends[-1 - job.profiled]) / job.profiled
            self.profiler.stop()

    def text(self, step: int, name: str, text: str) -> None: ...

    def sync(self) -> None:
        """Keep nothing that could be lost."""

    def close(self) -> None: ...


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        result = measure(job)
    except torch.OutOfMemoryError as reason:
        print(str(reason).splitlines()[0], file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)
    print(PREFIX + json.dumps(result), flush=True)


def measure(job: Job) -> dict:
    """Train the job's steps and return times, FLOPs, MFU, memory and the profile."""
    scratch = Path(job.scratch)
    run = set_up(make_config(job, write_shards(job, scratch / "data"), scratch / "run"), resume="never")
    run.loss_fn = _named_region(run.loss_fn)
    peak = device_peak(run.device, run.dtype)
    watch = Watch(job, run.device)
    with closing(Reporter(run, [watch], peak.tflops)) as reporter, closing(run.loader):
        train_loop(run, run.loader, reporter)
    first = job.warmup - 1
    ends = watch.ends[first : first + job.steps + 1]
    seconds = [end - start for start, end in pairwise(ends)]
    result = {
        "job": {name: value for name, value in asdict(job).items() if name != "scratch"},
        "device": _device_name(run.device),
        "torch": torch.__version__,
        "num_params": sum(p.numel() for p in run.model.parameters()),
        "step_seconds": seconds,
        "peak_tflops": peak.tflops,
        "peak_source": peak.source,
        "peak_memory_bytes": peak_memory(run.device),
        "losses": watch.losses,
        **_throughput(run, job, statistics.median(seconds), peak.tflops),
    }
    if job.profiled:
        result["profile"] = describe_profile(watch.profiler, run.device, job.profiled, watch.profiled_seconds)
    return result


def make_config(job: Job, data: Path, out: Path) -> Config:
    """Return the run's settings; whatever isn't named is TernLM's default."""
    sections: dict[str, Any] = {
        "out": str(out),
        "model": {"preset": job.preset, "num_hidden_layers": job.layers, "max_position_embeddings": job.seq_len},
        "data": {"seq_len": job.seq_len, "sources": ({"name": "bench", "path": str(data)},)},
        "batch": {
            "global_sequences": job.microbatch * job.accumulate,
            "microbatch_sequences": job.microbatch,
        },
        "train": {"steps": job.warmup + job.steps + job.profiled},
        "schedule": {"kind": "constant", "warmup_fraction": 0.0},
        "compute": {
            "device": job.device,
            "dtype": job.dtype,
            "recompute": job.recompute,
            "recompute_keep": job.recompute_keep,
            "compile": job.compile,
        },
        "checkpoint": {"every_steps": 0, "wait": True},
    }
    return Config.model_validate(sections)


def write_shards(job: Job, folder: Path) -> Path:
    """Write one long document of random ids as a prepared data set; its tokenizer is a stub."""
    folder.mkdir(parents=True)
    tokenizer = train_bpe(iter(["a stub"]), 260)
    tokenizer.save(folder)
    count = job.tokens_per_step * 4 + 1
    ids = np.random.default_rng(20231).integers(3, _vocab_size(job.preset), size=count)
    with ShardWriter(folder, "shard-00000", _vocab_size(job.preset)) as shard:
        shard.add(ids)
    said = {"fingerprint": tokenizer.fingerprint, "vocab_size": _vocab_size(job.preset)}
    write_manifest(folder, [shard.close()], tokenizer=said, num_bytes=count, options={})
    return folder


def _vocab_size(preset: str) -> int:
    return int(PRESETS[preset]["vocab_size"])


def _named_region(loss_fn: LossFn) -> LossFn:
    """Name the head and loss in the profile; the chunked loss makes its gradients there too."""

    def named(head: Head, hidden_BTD: torch.Tensor, batch: Batch) -> Loss:
        with torch.profiler.record_function("head and loss"):
            return loss_fn(head, hidden_BTD, batch)

    return named


def _throughput(run: Run, job: Job, step_seconds: float, peak_tflops: float) -> dict[str, float]:
    repeated = job.recompute if job.recompute_keep == "nothing" else 0.0
    flops = training_flops_per_token(run.config.model, job.seq_len, repeated)
    tokens_per_s = job.tokens_per_step / step_seconds
    rates = {"full": flops.full, "causal": flops.causal, "hardware": flops.hardware}
    tflops = {f"tflops_{name}": each * tokens_per_s / 1e12 for name, each in rates.items()}
    mfu = {f"mfu_{name}": each * tokens_per_s / 1e12 / peak_tflops for name, each in rates.items()}
    return {"tokens_per_s": tokens_per_s, **tflops, **mfu}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
