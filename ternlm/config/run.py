"""The root of the settings: one training run, as the trainer takes it."""

from collections.abc import Sized
from typing import Annotated

from pydantic import model_validator

from ternlm.config.adapter import AdapterConfig
from ternlm.config.data import BatchConfig, DataConfig
from ternlm.config.model import ModelConfig
from ternlm.config.parallel import OrAuto, ParallelConfig, ShardingConfig
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


class LoadConfig(Section):
    """Weights to start from; a resumed run needs it only for what its adapters belong to."""

    checkpoint: str | None = setting(
        None,
        "what a new run's weights are taken from: a run, a checkpoint, or a model of another format, by path or name",
        alias="from",
    )


def check_held_out(validation: ValidationConfig, sources: Sized, fraction: float) -> None:
    """Raise ValueError where validations are wished for and nothing is held out: no sources, and no share of others."""
    if validation.every_steps and not sources and not fraction:
        raise ValueError(
            "validation.every_steps is set but there is nothing to validate on; "
            "set data.validation_fraction or data.validation"
        )


class Config(Section):
    """Everything a training run depends on."""

    out: str = setting("runs/run", "folder for checkpoints, metrics and the resolved settings", min_length=1)
    seed: int = setting(1234, "of weights and data order", ge=0, lt=2**63)
    model: ModelConfig = setting(..., "the model")
    data: DataConfig = setting(..., "the data")
    batch: BatchConfig = setting(..., "the batch")
    train: TrainConfig = setting(..., "the run's length and safety")
    optimizer: OptimizerConfig = setting(OptimizerConfig, "the optimizer")
    schedule: ScheduleConfig = setting(ScheduleConfig, "the learning rate over time")
    loss: LossConfig = setting(LossConfig, "the objective")
    compute: ComputeConfig = setting(ComputeConfig, "device, precision, memory")
    parallel: Annotated[ParallelConfig, OrAuto()] = setting(ParallelConfig, "degrees of parallelism")
    sharding: ShardingConfig = setting(ShardingConfig, "over how many ranks states are cut")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "saving")
    monitor: MonitorConfig = setting(MonitorConfig, "metrics")
    validation: ValidationConfig = setting(ValidationConfig, "held-out loss")
    sample: SampleConfig = setting(SampleConfig, "sampled text")
    load: LoadConfig = setting(LoadConfig, "weights to start from")
    adapter: AdapterConfig | None = setting(None, "train low-rank adapters of the blocks' matrices, and nothing else")

    @model_validator(mode="after")
    def _check(self) -> "Config":
        scaled = self.model.rope_scaling.kind != "default"
        if self.data.seq_len > self.model.max_position_embeddings and not scaled:
            raise ValueError(
                f"data.seq_len = {self.data.seq_len} must be at most model.max_position_embeddings = "
                f"{self.model.max_position_embeddings}; raise the latter or set model.rope_scaling"
            )
        check_held_out(self.validation, self.data.validation, self.data.validation_fraction)
        if self.adapter and not self.load.checkpoint:
            raise ValueError("adapter is set and load.from isn't; name the model whose weights stay frozen")
        if self.adapter and self.optimizer.kind == "muon":
            raise ValueError("optimizer.kind = 'muon' is for whole matrices, not adapters; set it to 'adamw'")
        return self
