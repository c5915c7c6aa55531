"""The catalogue of metrics: each name with its unit and meaning, in one table.

`docs/metrics.md` is this table as text (`python -m ternlm.monitor.names > docs/metrics.md`); the line on the
log and the progress bar take units and brevity from it. A metric that isn't here is still recorded.
"""

from typing import NamedTuple

SOURCE = "SOURCE"
"""In a name: `total`, or a source's name from the settings."""
PART = "PART"
"""In a name: a part of a step."""


class Metric(NamedTuple):
    """One metric."""

    name: str
    unit: str
    meaning: str
    brief: bool = False
    """Whether it stands on the log line and the progress bar."""


METRICS: tuple[Metric, ...] = (
    Metric("loss/SOURCE", "nats/token", "cross entropy of the next token, over the trained tokens", True),
    Metric("perplexity/SOURCE", "", "e to the power of the loss"),
    Metric("accuracy/SOURCE", "share", "trained tokens whose most likely prediction was right"),
    Metric("bpb/SOURCE", "bits/byte", "bits that the loss needs for each UTF-8 byte of text"),
    Metric("validation_loss/SOURCE", "nats/token", "the same on held-out data", True),
    Metric("validation_perplexity/SOURCE", "", "the same on held-out data"),
    Metric("validation_accuracy/SOURCE", "share", "the same on held-out data"),
    Metric("validation_bpb/SOURCE", "bits/byte", "the same on held-out data", True),
    Metric("grad/norm", "", "2-norm of the whole gradient, before clipping", True),
    Metric("lr/adamw", "", "learning rate of AdamW's parameters", True),
    Metric("lr/muon", "", "learning rate of Muon's matrices"),
    Metric("optimizer/beta2", "", "decay of AdamW's second moment"),
    Metric("scaler/scale", "", "factor on the loss in float16 training"),
    Metric("train/tokens", "tokens", "tokens trained on since the run began, padding included"),
    Metric("train/sequences", "sequences", "sequences of this step"),
    Metric("train/skipped", "steps", "steps whose update was not applied since the run began", True),
    Metric("speed/tokens_per_s", "tokens/s", "tokens a second and device in the last step (TGS)", True),
    Metric("speed/tokens_per_s_10", "tokens/s", "the same over the last 10 steps"),
    Metric("speed/tokens_per_s_50", "tokens/s", "the same over the last 50 steps"),
    Metric("speed/tflops_full", "TFLOPS", "matrix products a second and device, attention counted in full"),
    Metric("speed/tflops_causal", "TFLOPS", "the same with half of the attention, as a causal kernel has it"),
    Metric("speed/tflops_hardware", "TFLOPS", "tflops_full and what recomputed blocks run a second time"),
    Metric("speed/mfu_full", "share", "tflops_full over the device's peak (model FLOPs utilisation)", True),
    Metric("speed/mfu_causal", "share", "tflops_causal over the device's peak"),
    Metric("speed/mfu_hardware", "share", "tflops_hardware over the device's peak (hardware utilisation)"),
    Metric("memory/peak_gib", "GiB", "rank 0's most memory held so far, by CUDA's allocator or the process", True),
    Metric("data/wait_ms", "ms", "time rank 0 waited for the last step's batch"),
    Metric("data/wait_share", "share", "part of the last 50 steps' time that rank 0 waited for batches"),
    Metric("time/step_s", "s", "duration of the last step, waiting included"),
    Metric("time/elapsed_s", "s", "time spent in steps since the run began, over all its restarts"),
    Metric(
        "step/profiled_s",
        "s",
        "a profiled step's duration on the slowest rank that is compared, its batch not waited for",
    ),
    Metric("step/PART", "s", "of it, what went to a part: matmul, attention, all_gather_over_shard, waiting ..."),
    Metric("planned/step_s", "s", "what the planner predicts of such a step"),
    Metric("planned/peak_gib", "GiB", "memory that the planner predicts of the rank that needs most, with its reserve"),
    Metric("planned/PART", "s", "of it, what goes to the part"),
    Metric("time/eta_s", "s", "time left at the pace of the last 50 steps, or until the time budget", True),
)

_BY_NAME = {metric.name: metric for metric in METRICS}


def find_metric(name: str) -> Metric | None:
    """Return the entry of a metric's name, such as `loss/en`; None where the table has none."""
    group = name.partition("/")[0]
    return _BY_NAME.get(name) or _BY_NAME.get(f"{group}/{SOURCE}") or _BY_NAME.get(f"{group}/{PART}")


def render_table() -> str:
    """Return the text of `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        f"Names are `group/name_unit`, the same in every sink. `{SOURCE}` is `total` or the name of a data",
        "source. Of many devices, speeds are those of one. Steps count from 1; a step's metrics carry the",
        f"number of steps done. `{PART}` is a part of a step as `tern plan` names it. This page is written by",
        "`python -m ternlm.monitor.names > docs/metrics.md`.",
        "",
        "| name | unit | meaning |",
        "|---|---|---|",
    ]
    lines += [f"| `{metric.name}` | {metric.unit} | {metric.meaning} |" for metric in METRICS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_table(), end="")
