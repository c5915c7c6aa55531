"""Settings of a run: sections, presets, TOML recipes, overrides, help. Knows no torch."""

from ternlm.config.adapter import AdapterConfig
from ternlm.config.data import BatchConfig, DataConfig, RampupConfig, SourceConfig
from ternlm.config.load import (
    config_from_dict,
    config_to_dict,
    list_recipes,
    load_any_config,
    load_config,
    load_sft_config,
)
from ternlm.config.model import PRESETS, InitConfig, ModelConfig, RopeScaling
from ternlm.config.parallel import ParallelConfig, ShardingConfig
from ternlm.config.run import Config, LoadConfig
from ternlm.config.section import ConfigError, Section, UserError, setting
from ternlm.config.sft import SftConfig
from ternlm.config.show import diff, json_schema, render
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

__all__ = [
    "PRESETS",
    "AdapterConfig",
    "BatchConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "InitConfig",
    "LoadConfig",
    "LossConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RampupConfig",
    "RopeScaling",
    "SampleConfig",
    "ScheduleConfig",
    "Section",
    "SftConfig",
    "ShardingConfig",
    "SourceConfig",
    "TrainConfig",
    "UserError",
    "ValidationConfig",
    "config_from_dict",
    "config_to_dict",
    "diff",
    "json_schema",
    "list_recipes",
    "load_any_config",
    "load_config",
    "load_sft_config",
    "render",
    "setting",
]
