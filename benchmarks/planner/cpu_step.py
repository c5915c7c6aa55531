"""One training run in a process of its own, that takes a step whenever its standard input says so.

Started by cpu.py with a file of settings. Through the same path as `tern train`: `set_up` and `train_loop`. Prints
`ready` once it is set up, and after each step its seconds and the lengths of the documents in it, as JSON; of a step
that is asked for as `profile`, its seconds by part too.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing

from ternlm.config import load_config
from ternlm.data.batch import Batch
from ternlm.monitor.step_profile import StepProfile
from ternlm.planner.flops import squared_lengths
from ternlm.train.loop import Every, train_loop
from ternlm.train.report import Reporter
from ternlm.train.run import Run, set_up


class Stepwise:
    """A sink that ends each step with its figures, and holds the loop until the next one is asked for."""

    def __init__(self) -> None:
        self.lengths: list[tuple[int, ...]] = []
        """Of the segments in the newest step's rows."""
        self.profiled = False
        """Whether the step that was asked for is to be profiled."""
        self.parts: dict[str, float] = {}
        self._began = 0.0

    def wait(self) -> None:
        """Start the clock when a line comes; end the process when none will."""
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        self.profiled, self.parts = line == "profile\n", {}
        self._began = time.perf_counter()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the step that has just ended."""
        seconds, tokens = time.perf_counter() - self._began, sum(map(sum, self.lengths))
        document = squared_lengths(self.lengths) / tokens
        said = {"seconds": seconds, "document": document, "loss": metrics["loss/total"], "parts": self.parts}
        print(json.dumps(said), flush=True)
        self.wait()

    def text(self, step: int, name: str, text: str) -> None:
        """Print nothing."""

    def sync(self) -> None:
        """Keep nothing that could be lost."""

    def close(self) -> None:
        """Close nothing."""


def batches(run: Run, sink: Stepwise) -> Iterator[list[Batch]]:
    """Yield the loader's batches, noting their documents."""
    for microbatches in run.loader:
        sink.lengths = [row for batch in microbatches for row in batch.lengths]
        yield microbatches


def main() -> None:
    """Set up, then train as asked."""
    run = set_up(load_config(sys.argv[1]), resume="never")
    sink = Stepwise()
    with closing(Reporter(run, [sink], peak_tflops=1.0)) as reporter, closing(run.loader):
        print("ready", flush=True)
        profile = StepProfile(run.mesh)

        def read() -> dict[str, float]:
            sink.parts = profile.stop()
            return {}

        sink.wait()
        profiled = Every(lambda step: sink.profiled, read, lambda microbatches: profile.start())
        train_loop(run, batches(run, sink), reporter, [profiled])


if __name__ == "__main__":
    main()
