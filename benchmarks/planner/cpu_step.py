"""One training run in a process of its own, that takes a step whenever its standard input says so.

Started by cpu.py with a file of settings. Through the same path as `tern train`: `set_up` and `train_loop`. Prints
`ready` once it is set up, and after each step its seconds and the lengths of the documents in it, as JSON.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing

from ternlm.config import load_config
from ternlm.data.batch import Batch
from ternlm.planner.flops import squared_lengths
from ternlm.train.loop import train_loop
from ternlm.train.report import Reporter
from ternlm.train.run import Run, set_up


class Stepwise:
    """A sink that ends each step with its figures, and holds the loop until the next one is asked for."""

    def __init__(self) -> None:
        self.lengths: list[tuple[int, ...]] = []
        """Of the segments in the newest step's rows."""
        self._began = 0.0

    def wait(self) -> None:
        """Start the clock when a line comes; end the process when none will."""
        if not sys.stdin.readline():
            sys.exit()
        self._began = time.perf_counter()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the step that has just ended."""
        seconds, tokens = time.perf_counter() - self._began, sum(map(sum, self.lengths))
        document = squared_lengths(self.lengths) / tokens
        print(json.dumps({"seconds": seconds, "document": document, "loss": metrics["loss/total"]}), flush=True)
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
        sink.wait()
        train_loop(run, batches(run, sink), reporter)


if __name__ == "__main__":
    main()
