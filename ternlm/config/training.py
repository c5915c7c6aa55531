"""How a model is trained: steps, optimizer, schedule, loss, compute, checkpoints, monitoring, validation."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ternlm.config.section import Section, refuse_ignored, setting

Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """How long to train and what to do when a step goes wrong."""

    steps: int = setting(..., "optimizer steps of the whole run", unit="steps", gt=0)
    max_minutes: float | None = setting(
        None,
        "stop cleanly, with a checkpoint, after this long; the schedule still follows `steps`",
        unit="minutes",
        gt=0,
    )
    stop_file: str | None = setting(
        None, "file to which a step N can be written: save and stop at N; -N: save at N and go on"
    )
    spike: Literal["off", "skip", "stop"] = setting(
        "off",
        "a step whose loss exceeds spike_ratio times the recent mean: skip its update, or save and stop",
    )
    spike_ratio: float = setting(1.5, "loss over the recent mean that counts as a spike", gt=1)
    spike_window: int = setting(20, "steps in the recent mean; no spike is seen before", unit="steps", gt=0)
    max_skipped_in_row: int = setting(
        20, "stop with an error after this many skipped steps in a row", unit="steps", gt=0
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.spike == "off":
            refuse_ignored(self, ("spike_ratio", "spike_window"), "spike = 'off'", "set spike to 'skip' or 'stop'")
        return self


class OptimizerConfig(Section):
    """AdamW, or Muon for the matrices of the blocks beside AdamW for the rest."""

    kind: Literal["adamw", "muon"] = setting(
        "adamw", "adamw; muon: orthogonalised momentum for the blocks' matrices, adamw for everything else"
    )
    lr: float = setting(1e-4, "peak learning rate", gt=0)
    betas: tuple[Decay, Decay] = setting((0.9, 0.95), "decay of the first and second moment", strict=False)
    beta2_ramp: float = setting(
        0.0, "c of beta2 = max(betas[1], 1 - step^-c); 0 keeps it constant (the ancestor's c)", ge=0
    )
    eps: float = setting(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = setting(0.1, "decoupled weight decay", ge=0)
    decay_all: bool = setting(False, "decay norms and biases too, beside the matrices (as the ancestor did)")
    clip_norm: float = setting(1.0, "largest norm of the gradient; 0: no clipping", ge=0)
    muon_lr: float = setting(0.02, "muon: peak learning rate of the blocks' matrices", gt=0)
    muon_momentum: float = setting(0.95, "muon: momentum", ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if self.kind != "muon":
            refuse_ignored(self, ("muon_lr", "muon_momentum"), f"kind = {self.kind!r}", "set kind to 'muon'")
        return self


class ScheduleConfig(Section):
    """Learning rate over steps: warm-up, then cosine, constant, or warm-up-stable-decay."""

    kind: Literal["cosine", "constant", "wsd"] = setting(
        "cosine", "cosine to min_lr; constant; wsd: constant, then down to min_lr in the last decay_fraction"
    )
    warmup_fraction: float = setting(0.01, "share of the steps with rising learning rate", ge=0, lt=1)
    min_lr: float = setting(0.0, "learning rate at the end, as a fraction of the peak", ge=0, le=1)
    decay_fraction: float = setting(0.2, "wsd: share of the steps in the final decay", gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        if self.kind == "constant":
            refuse_ignored(self, ("min_lr",), "kind = 'constant'", "set kind to 'cosine' or 'wsd'")
        if self.kind != "wsd":
            refuse_ignored(self, ("decay_fraction",), f"kind = {self.kind!r}", "set kind to 'wsd'")
        if self.kind == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction = {self.warmup_fraction} and decay_fraction = {self.decay_fraction} "
                "must not exceed 1 together"
            )
        return self


class LossConfig(Section):
    """Cross entropy over the next token."""

    label_smoothing: float = setting(0.0, "probability spread evenly over the vocabulary", ge=0, lt=1)
    z_loss: float = setting(0.0, "weight of the squared log-normaliser", ge=0)
    chunk_tokens: int = setting(
        0,
        "tokens whose logits exist at one time; the logits of a whole microbatch never do; 0: as many as make "
        "128 MiB of float32 logits on a CPU, 1 GiB on a GPU",
        unit="tokens",
        ge=0,
    )


class ComputeConfig(Section):
    """Device, number formats and what is recomputed or compiled."""

    device: str = setting(
        "auto",
        "auto: cuda if there is one, else cpu; or cpu, cuda, cuda:N",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the matrix products; auto: bfloat16 where the device is fast at it, else float32"
    )
    threads: int = setting(0, "CPU threads of PyTorch; 0: as many as the process may use", ge=0)
    compile: Literal["auto", "on", "off"] = setting("auto", "compile each block; auto: where a compiler is found")
    recompute: float = setting(
        0.0,
        "share of a rank's blocks, rounded up, from the first, whose activations are recomputed in backward",
        ge=0,
        le=1,
    )
    recompute_keep: Literal["nothing", "matmuls"] = setting(
        "nothing",
        "what a recomputed block still keeps: nothing, or the results of matrix products and attention",
    )
    peak_tflops: float | None = setting(
        None, "the device's peak for MFU; from the table of devices, or measured, if not given", gt=0
    )

    @model_validator(mode="after")
    def _check(self) -> "ComputeConfig":
        if self.recompute == 0:
            refuse_ignored(self, ("recompute_keep",), "recompute = 0", "set recompute above 0")
        return self


def recomputed_blocks(blocks: int, fraction: float) -> int:
    """Return how many of a rank's blocks `compute.recompute` = fraction means, rounded up."""
    return math.ceil(round(blocks * fraction, 6))  # 0.1 of 30 is 3.0000000000000004


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every_steps: int = setting(1000, "save after so many steps; 0: only at the end", unit="steps", ge=0)
    every_minutes: float = setting(0.0, "save also when this long has passed; 0: never", unit="minutes", ge=0)
    keep_last: int = setting(2, "newest checkpoints kept", gt=0)
    keep_every_steps: int = setting(
        0, "checkpoints at multiples of this are kept for ever; 0: none", unit="steps", ge=0
    )
    wait: bool = setting(False, "write while training stands still instead of in the background")


class MonitorConfig(Section):
    """Where metrics go."""

    every_steps: int = setting(1, "steps between two reports", unit="steps", gt=0)
    progress: Literal["auto", "bar", "lines", "off"] = setting(
        "auto",
        "bar: on the error stream; lines: one line of key=value a report, at most one a second; auto: bar on a "
        "terminal, else lines",
    )
    jsonl: bool = setting(True, "write metrics.jsonl into the run's folder")
    tensorboard: bool = setting(False, "write TensorBoard events (extra `tensorboard`)")
    plan_every_steps: int = setting(
        0,
        "steps between two comparisons of a step's parts with what the planner predicts of them; needs a cluster that "
        "it knows: parallel.cluster, or a device that it has the data sheet of; 0: never",
        unit="steps",
        ge=0,
    )
    plan_bound: float = setting(
        0.1, "share of the predicted step by which one part may be off before a warning names it", gt=0
    )

    @model_validator(mode="after")
    def _check(self) -> "MonitorConfig":
        if not self.plan_every_steps:
            refuse_ignored(self, ("plan_bound",), "plan_every_steps = 0", "set plan_every_steps above 0")
        return self


class ValidationConfig(Section):
    """Loss on held-out data during training."""

    every_steps: int = setting(
        0,
        "steps between validations; 0: never, and held-out documents are then only left out of training",
        unit="steps",
        ge=0,
    )
    at_start: bool = setting(False, "validate a new run before its first step, too")
    max_sequences: int = setting(256, "sequences of each validation source; 0: all of them", unit="sequences", ge=0)
    patience: int = setting(
        0,
        "stop once the loss over all held-out tokens hasn't fallen for so many validations, and keep the checkpoint of "
        "the best one; 0: never",
        unit="validations",
        ge=0,
    )

    @model_validator(mode="after")
    def _check(self) -> "ValidationConfig":
        if not self.every_steps:
            refuse_ignored(self, ("patience", "at_start"), "every_steps = 0", "set every_steps above 0")
        return self


class SampleConfig(Section):
    """Text sampled from the model during training."""

    every_steps: int = setting(0, "steps between samples; 0: never", unit="steps", ge=0)
    prompts: tuple[str, ...] = setting((), "texts to continue", strict=False)
    max_new_tokens: int = setting(64, "length of a continuation", unit="tokens", gt=0)
    temperature: float = setting(0.8, "0: greedy", ge=0)

    @model_validator(mode="after")
    def _check(self) -> "SampleConfig":
        if self.every_steps and not self.prompts:
            raise ValueError("every_steps is set but prompts is empty; give at least one prompt")
        if not self.every_steps:
            refuse_ignored(self, ("prompts",), "every_steps = 0", "set every_steps above 0")
        return self
