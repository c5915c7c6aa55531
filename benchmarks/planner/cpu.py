"""Planned against measured step time of training on this machine's CPU.

    python benchmarks/planner/cpu.py

Runs `tern calibrate`, then trains the runs of cpu_shapes.py, each in a process of its own, a step of one after a step
of another, and holds the medians against what the planner says from the cluster file. Linux only. A step during which
other processes had the processors for more than CALM of the time is left out and counted; so is such a calibration.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpu_shapes import HELD_OUT, SHAPES, Shape, make_config, write_data

from ternlm.config import Config, render
from ternlm.config.layout import Layout
from ternlm.planner.cluster import Cluster
from ternlm.planner.compare import KERNELS, comparable
from ternlm.planner.known import find_cluster
from ternlm.planner.step_time import StepTime, describe_step, step_time

HERE = Path(__file__).resolve().parent
CALM = 0.02
WARM_UP = 3
PROFILED = 3
"""Steps of each run whose parts are measured."""
sys.path.insert(0, str(HERE.parent))


class Machine:
    """Tells how much of the processors' time others have had since a moment."""

    def __init__(self, pid: int | None = None) -> None:
        """pid: of the process, or the parent of those waited for, that isn't one of the others."""
        self._pid = pid or os.getpid()
        self._began, self._busy, self._own = time.monotonic(), self._all(), self._of_process()

    def others(self) -> float:
        """Return the share of all processors' time that other processes, or the host, took."""
        own, hertz = self._of_process() - self._own, os.sysconf("SC_CLK_TCK")
        ours_too = (self._all() - self._busy - own) / hertz
        return max(ours_too, 0.0) / (len(os.sched_getaffinity(0)) * (time.monotonic() - self._began))

    @staticmethod
    def _all() -> int:
        user, nice, system, _idle, _wait, *rest = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
        return user + nice + system + sum(rest)

    def _of_process(self) -> int:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15]))  # of itself and of the children it waited for


@dataclass
class Measured:
    """A run's process and its steps."""

    shape: Shape
    config: Config
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    documents: list[float] = field(default_factory=list)
    disturbed: int = 0
    parts: list[dict[str, float]] = field(default_factory=list)
    """Of profiled steps."""

    def step(self, counts: bool = True) -> bool:
        """Let the process take a step; return whether the machine was calm."""
        machine = Machine(self.process.pid)
        said = self._ask("step")
        calm = machine.others() < CALM
        if calm and counts:
            self.seconds.append(said["seconds"])
            self.documents.append(said["document"])
        self.disturbed += counts and not calm
        return calm

    def profile(self) -> bool:
        """Let the process take a step that is profiled; return whether the machine was calm."""
        machine = Machine(self.process.pid)
        said = self._ask("profile")
        calm = machine.others() < CALM
        if calm:
            self.parts.append(comparable(said["parts"]))
        return calm

    def _ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.shape.name}: the process has ended with {self.process.wait()}")
        return json.loads(line)


def start(shape: Shape, folder: Path, steps: int, threads: int) -> Measured:
    """Start a run's process and let it take the steps in which it compiles and warms up."""
    own = folder / shape.name
    write_data(shape, own / "data", min(steps, 200))
    config = make_config(shape, own / "data", own / "run", steps, threads)
    (own / "run.toml").write_text(render(config))
    process = subprocess.Popen(
        [sys.executable, str(HERE / "cpu_step.py"), str(own / "run.toml")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"{shape.name}: the process didn't start")
    measured = Measured(shape, config, process)
    for _ in range(WARM_UP):
        measured.step(counts=False)
    print(f"{shape.name}: started", flush=True)
    return measured


def wait_for_calm(until: float) -> None:
    """Return once others have left the processors alone for a while, or at `until`."""
    while time.monotonic() < until:
        machine = Machine()
        time.sleep(3)
        if machine.others() < CALM:
            return


def calibrate(out: Path, seconds: float, until: float) -> tuple[Cluster, float]:
    """Run `tern calibrate` until it was left alone; return its cluster and what share others had."""
    while True:
        wait_for_calm(until)
        machine = Machine()
        command = [sys.executable, "-m", "ternlm", "calibrate", "--out", str(out), "--device", "cpu"]
        subprocess.run([*command, "--dtype", "float32", "--seconds", str(seconds)], check=True)
        others = machine.others()
        print(f"calibrated; others had {others:.1%}", flush=True)
        if others < CALM or time.monotonic() > until:
            return find_cluster(str(out)), others


def measure(runs: list[Measured], steps: int, until: float) -> None:
    """Take a step of each run in turns, back and forth, until each has so many calm ones, or `until`.

    Then a few profiled ones, likewise.
    """
    turn = 0
    while (left := [run for run in runs if len(run.seconds) < steps]) and time.monotonic() < until:
        for run in left if turn % 2 else reversed(left):
            if not run.step():
                wait_for_calm(until)
        turn += 1
    while (left := [run for run in runs if len(run.parts) < PROFILED]) and time.monotonic() < until + 300:
        for run in left:
            if not run.profile():
                wait_for_calm(until + 300)


def plan(run: Measured, cluster: Cluster) -> StepTime:
    """Return the planned step, of documents as those of the measured steps."""
    document = round(statistics.mean(run.documents))
    return step_time(describe_step(run.config, Layout(1), 1, document_tokens=document), cluster)


def result_of(run: Measured, cluster: Cluster, held_out: bool) -> dict[str, Any]:
    """Return a run's line of the report."""
    if len(run.seconds) < 3:
        raise SystemExit(f"{run.shape.name}: only {len(run.seconds)} calm steps; run again on a quieter machine")
    planned, measured = plan(run, cluster), statistics.median(run.seconds)
    parts = sorted({part for step in run.parts for part in step})
    return {
        "shape": asdict(run.shape),
        "held_out": held_out,
        "parameters": run.config.model.num_params,
        "document_tokens": statistics.mean(run.documents),
        "measured_seconds": measured,
        "planned_seconds": planned.seconds,
        "error": planned.seconds / measured - 1,
        "planned_parts": planned.parts,
        "measured_parts": {part: statistics.median(step.get(part, 0.0) for step in run.parts) for part in parts},
        "steps_profiled": len(run.parts),
        "steps": run.seconds,
        "steps_left_out": run.disturbed,
    }


def format_report(result: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    hardware = result["hardware"]
    lines = [
        "# Planned against measured: training on a CPU",
        "",
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads, "
        f"{hardware['memory_gib']} GiB, {' '.join(hardware['vector_instructions'])}; torch {result['torch']}; float32. "
        f"`tern calibrate --seconds {result['calibrate_seconds']:g}` came first, and knows none of these shapes; those "
        "held out were measured after the last change to the planner. Medians of calm steps; steps left out are those "
        "during which other processes had over "
        f"{result['calm']:.0%} of the processors.",
        "",
        "| run | model | tokens a step | measured, s | steps (left out) | planned, s | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["runs"]:
        shape = row["shape"]
        about = f"{shape['layers']} x {shape['hidden']}, vocabulary {shape['vocab']}"
        if shape["recompute"]:
            about += f", recompute {shape['recompute']:g}"
        if shape["compile"] == "off":
            about += ", not compiled"
        tokens = f"{shape['sequences']} x {shape['seq_len']} in microbatches of {shape['microbatch']}"
        if shape["document"]:
            tokens += f", documents of {shape['document']}"
        name = f"{shape['name']} (held out)" if row["held_out"] else shape["name"]
        lines.append(
            f"| {name} | {about} | {tokens} | {row['measured_seconds']:.3f} | {len(row['steps'])} "
            f"({row['steps_left_out']}) | {row['planned_seconds']:.3f} | {row['error']:+.1%} |"
        )
    return "\n".join([*lines, "", *format_parts(result["runs"]), ""])


def format_parts(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of parts: measured and planned, and how far apart as a share of the planned step."""
    lines = [
        "By parts, of profiled steps (`monitor.plan_every_steps` shows the same while a run trains): measured / "
        "planned milliseconds, and the difference as a share of the planned step. `idle` is Python and what isn't in "
        "an operator.",
        "",
        f"| run | {' | '.join(KERNELS)} |",
        f"|---|{'---|' * len(KERNELS)}",
    ]
    worst = 0.0
    for row in rows:
        planned, cells = comparable(row["planned_parts"]), []
        for part in KERNELS:
            measured, expected = row["measured_parts"].get(part, 0.0), planned.get(part, 0.0)
            off = (measured - expected) / row["planned_seconds"]
            worst = max(worst, abs(off))
            cells.append(f"{measured * 1e3:.1f} / {expected * 1e3:.1f} ({off:+.1%})")
        lines.append(f"| {row['shape']['name']} | {' | '.join(cells)} |")
    return [*lines, "", f"The part that is furthest off: {worst:.1%} of a planned step."]


def main() -> None:
    """Calibrate, measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9, help="calm steps of each run")
    parser.add_argument("--seconds", type=float, default=60.0, help="of calibration")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which it makes do with what it has")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    options = parser.parse_args()
    from interleaved.figures import describe_hardware

    threads, until = len(os.sched_getaffinity(0)), time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="ternlm-plan-") as folder:
        cluster, others = calibrate(Path(folder) / "cluster.toml", options.seconds, until)
        text = (Path(folder) / "cluster.toml").read_text()
        runs: list[Measured] = []
        try:
            for shape in (*SHAPES, *HELD_OUT):
                run = start(shape, Path(folder), 10**6, threads)
                runs.append(run)
            measure(runs, options.steps, until)
        finally:
            for run in runs:
                run.process.kill()
                run.process.wait()
    import torch

    result = {
        "hardware": describe_hardware(threads),
        "torch": torch.__version__,
        "calibrate_seconds": options.seconds,
        "calibration_others": others,
        "calm": CALM,
        "runs": [result_of(run, cluster, run.shape in HELD_OUT) for run in runs],
        "cluster": text.splitlines(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    report = format_report(result)
    options.out.with_suffix(".md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
