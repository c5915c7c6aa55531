"""The root of the settings of `tern sft`: conversations instead of prepared tokens, a model instead of a shape.

`ternlm/post/sft.py` makes a `Config` of them, which is what trains, once it has seen the model and the data.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import model_validator

from ternlm.config.adapter import AdapterConfig
from ternlm.config.data import BatchConfig
from ternlm.config.parallel import OrAuto, ParallelConfig, ShardingConfig
from ternlm.config.run import LoadConfig, check_held_out
from ternlm.config.section import Section, setting
from ternlm.config.training import (
    CheckpointConfig,
    ComputeConfig,
    LossConfig,
    MonitorConfig,
    OptimizerConfig,
    SampleConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

FormatName = Literal["auto", "messages", "sharegpt", "alpaca", "pairs", "text", "internlm"]


class ConversationSource(Section):
    """One named set of conversations."""

    name: str = setting(..., "data type in the metrics", min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    path: str = setting(..., "file, or folder of files: json, jsonl, parquet, or InternLM's .bin", min_length=1)
    format: FormatName = setting("auto", "what a record is; auto: by its fields")
    weight: float | None = setting(
        None, "share of the sequences, relative to the other sources; its number of sequences if not given", gt=0
    )


class ConversationsConfig(Section):
    """Conversations, how they become tokens, and how these fill sequences."""

    path: str | None = setting(None, "file, or folder of files, of the only source; short for sources")
    format: FormatName = setting("auto", "what a record at `path` is; auto: by its fields")
    sources: tuple[ConversationSource, ...] = setting((), "what to train on, where it is more than path", strict=False)
    validation: tuple[ConversationSource, ...] = setting(
        (), "what to validate on, beside validation_fraction", strict=False
    )
    validation_fraction: float = setting(0.0, "share of each source's samples held out for validation", ge=0, lt=1)
    chat: str = setting(
        "auto",
        "chat protocol: internlm, internlm2, chatml, llama3, or a file of a Jinja template; auto: the model's own",
    )
    system: str | None = setting(None, "system message of conversations that have none")
    tokenizer: str | None = setting(
        None, "tokenizer.json, sentencepiece .model or folder; the model's own if not given"
    )
    on_error: Literal["fail", "skip"] = setting("fail", "a record that can't be used ends the work, or is left out")
    seq_len: int = setting(2048, "tokens of one sequence", unit="tokens", gt=0)
    packing: Literal["best_fit", "pad"] = setting(
        "best_fit", "best_fit: whole samples, apart, as many as fit in a sequence; pad: one a sequence"
    )
    too_long: Literal["cut", "drop"] = setting("cut", "a sample longer than a sequence loses its end, or is left out")
    workers: int = setting(1, "threads that read and pack batches ahead", gt=0)
    prefetch: int = setting(4, "microbatches kept ready", unit="microbatches", gt=0)

    @model_validator(mode="after")
    def _check(self) -> "ConversationsConfig":
        if (self.path is None) == (not self.sources):
            raise ValueError("one of path and sources must say what to train on; give one, and only one")
        if self.sources and self.format != "auto":
            raise ValueError("format has no effect with sources; give each source its own")
        return self

    def all_sources(self) -> tuple[ConversationSource, ...]:
        """Return what to train on, `path` under its file's name."""
        if self.path is None:
            return self.sources
        stem = Path(self.path).name.split(".")[0]
        name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-") else "_" for letter in stem)
        return (ConversationSource(name=name or "data", path=self.path, format=self.format),)


class SftTrainConfig(TrainConfig):
    """How long to fine-tune."""

    steps: int | None = setting(  # type: ignore[assignment]
        None, "optimizer steps of the whole run; by `epochs` if not given", unit="steps", gt=0
    )
    epochs: float = setting(3.0, "times that the data is gone through, where steps isn't given", gt=0)


class SftOptimizerConfig(OptimizerConfig):
    """As for pretraining; the learning rate's default depends on what is trained, and nothing decays."""

    lr: float | None = setting(  # type: ignore[assignment]
        None, "peak learning rate; 1e-5 for the whole model, 2e-4 for adapters", gt=0
    )
    weight_decay: float = setting(0.0, "decoupled weight decay", ge=0)


class SftScheduleConfig(ScheduleConfig):
    """As for pretraining, with a longer warm-up."""

    warmup_fraction: float = setting(0.03, "share of the steps with rising learning rate", ge=0, lt=1)


class SftBatchConfig(BatchConfig):
    """How many sequences make a step."""

    global_sequences: int = setting(16, "sequences per optimizer step", unit="sequences", gt=0)


class SftConfig(Section):
    """Everything a fine-tuning run depends on."""

    out: str = setting("runs/sft", "folder for checkpoints, metrics and the resolved settings", min_length=1)
    seed: int = setting(1234, "of adapters and data order", ge=0, lt=2**63)
    load: LoadConfig = setting(..., "the model to fine-tune")
    data: ConversationsConfig = setting(..., "the conversations")
    adapter: AdapterConfig | None = setting(None, "train low-rank adapters of the blocks' matrices, and nothing else")
    batch: SftBatchConfig = setting(SftBatchConfig, "the batch")
    train: SftTrainConfig = setting(SftTrainConfig, "the run's length and safety")
    optimizer: SftOptimizerConfig = setting(SftOptimizerConfig, "the optimizer")
    schedule: SftScheduleConfig = setting(SftScheduleConfig, "the learning rate over time")
    loss: LossConfig = setting(LossConfig, "the objective")
    compute: ComputeConfig = setting(ComputeConfig, "device, precision, memory")
    parallel: Annotated[ParallelConfig, OrAuto()] = setting(ParallelConfig, "degrees of parallelism")
    sharding: ShardingConfig = setting(ShardingConfig, "over how many ranks states are cut")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "saving")
    monitor: MonitorConfig = setting(MonitorConfig, "metrics")
    validation: ValidationConfig = setting(ValidationConfig, "held-out loss")
    sample: SampleConfig = setting(SampleConfig, "answers to a few prompts during training")

    @model_validator(mode="after")
    def _check(self) -> "SftConfig":
        if not self.load.checkpoint:
            raise ValueError("load.from must name the model to fine-tune: a run, a checkpoint, or a folder or name")
        check_held_out(self.validation, self.data.validation, self.data.validation_fraction)
        return self

    def learning_rate(self) -> float:
        """Return the peak learning rate."""
        return self.optimizer.lr or (2e-4 if self.adapter else 1e-5)
