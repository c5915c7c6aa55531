"""What a step did, as metrics, to every sink."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ternlm.data.batch import Batch
from ternlm.monitor.memory import peak_memory
from ternlm.monitor.sinks import Sink
from ternlm.monitor.throughput import Throughput
from ternlm.planner.flops import squared_lengths, training_flops
from ternlm.train.metrics import loss_metrics
from ternlm.train.step import BatchLoss

if TYPE_CHECKING:
    from ternlm.train.run import Run


@dataclass(frozen=True)
class StepFacts:
    """What one step did."""

    loss: BatchLoss
    norm: float
    """2-norm of the gradient before clipping."""
    spiked: bool
    """Whether the spike rule asks the run to stop."""
    microbatches: Sequence[Batch]


class Reporter:
    """Turns steps into metrics and hands them to the sinks every `monitor.every_steps` steps."""

    def __init__(self, run: "Run", sinks: Sequence[Sink], peak_tflops: float) -> None:
        budget, layout = run.config.train.max_minutes, run.mesh.layout
        self._run, self._sinks = run, sinks
        self._throughput = Throughput(
            run.config.train.steps,
            num_devices=layout.world // layout.data,  # those that work on this rank's sequences
            peak_tflops=peak_tflops,
            max_seconds=budget * 60 if budget else None,
        )

    def report(self, facts: StepFacts | None, seconds: float, extra: dict[str, float], last: bool) -> None:
        """Report the step just done, None if it was passed over.

        Written every `monitor.every_steps`, after the last step of this process (`last`), and where there are `extra`
        metrics.
        """
        step = self._run.progress.step
        if facts is None:
            due, metrics = False, {}
        else:
            self._record(facts, seconds)
            due = last or step % self._run.config.monitor.every_steps == 0
            metrics = self._metrics(facts) if due else {}
        if due or extra:
            for sink in self._sinks:
                sink.write(step, {**metrics, **extra})

    def text(self, name: str, text: str) -> None:
        """Hand a text, such as a sample, to the sinks."""
        for sink in self._sinks:
            sink.text(self._run.progress.step, name, text)

    def sync(self) -> None:
        """Let the sinks make last what they recorded; to be called before a checkpoint of this moment is saved."""
        for sink in self._sinks:
            sink.sync()

    def close(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()

    def _record(self, facts: StepFacts, seconds: float) -> None:
        config = self._run.config
        tokens = sum(batch.tokens_BT.numel() for batch in facts.microbatches)
        pairs = sum(squared_lengths(batch.lengths) for batch in facts.microbatches)
        repeated = config.compute.recompute if config.compute.recompute_keep == "nothing" else 0.0
        flops = training_flops(config.model, tokens, pairs, repeated, config.adapter)
        self._throughput.record(tokens, seconds, flops, self._run.loader.wait_seconds)

    def _metrics(self, facts: StepFacts) -> dict[str, float]:
        run, progress = self._run, self._run.progress
        sums = facts.loss.metrics
        metrics = loss_metrics({name: sum(values) for name, values in sums.items()}, "total")
        names = facts.microbatches[0].names
        if len(names) > 1:
            for index, name in enumerate(names):
                metrics |= loss_metrics({key: values[index] for key, values in sums.items()}, name)
        metrics["grad/norm"] = facts.norm
        for optimizer in run.optimizers:
            metrics[f"lr/{type(optimizer).__name__.lower()}"] = optimizer.param_groups[0]["lr"]
        if "betas" in run.optimizers[0].param_groups[0]:
            metrics["optimizer/beta2"] = run.optimizers[0].param_groups[0]["betas"][1]
        if run.scaler:
            metrics["scaler/scale"] = run.scaler.scale
        metrics["train/tokens"] = progress.tokens
        metrics["train/sequences"] = sum(len(batch.tokens_BT) for batch in facts.microbatches) * run.mesh.layout.data
        metrics["train/skipped"] = progress.skipped
        metrics["memory/peak_gib"] = peak_memory(run.device) / 2**30
        return metrics | self._throughput.metrics(progress.step, progress.seconds)
