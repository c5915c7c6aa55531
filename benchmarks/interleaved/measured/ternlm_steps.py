"""Run TernLM's own loop, marking the end of each step by a sink."""

from collections.abc import Iterable, Mapping
from contextlib import closing

from steps import Steps

from ternlm.data.batch import Batch
from ternlm.train.loop import train_loop
from ternlm.train.report import Reporter
from ternlm.train.run import Run


class MarkSteps:
    """A sink that marks each step's end and keeps its metrics."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.metrics: list[dict[str, float]] = []

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.mark()
        self.metrics.append(dict(metrics))

    def text(self, step: int, name: str, text: str) -> None: ...

    def sync(self) -> None:
        """Keep nothing that could be lost."""

    def close(self) -> None: ...


def train(run: Run, batches: Iterable[list[Batch]], steps: Steps) -> list[dict[str, float]]:
    """Run `train_loop` and return each step's metrics.

    The checkpoint that ends every run comes after the last mark.
    """
    sink = MarkSteps(steps)
    # MFU is the benchmark's to work out.
    with closing(Reporter(run, [sink], peak_tflops=1.0)) as reporter:
        train_loop(run, batches, reporter)
    return sink.metrics
