"""The configuration of a run: one frozen tree from one YAML file; unknown keys are errors."""

from system.config.data import IngestConfig, Section, SourceConfig, TagConfig
from system.config.influence import AutoConfig, InfluenceConfig
from system.config.model import LoraConfig, ModelConfig, TinyModelConfig
from system.config.run import (
    ClusterConfig,
    CurriculumConfig,
    GroupLimit,
    RunConfig,
    SelectConfig,
    SolveConfig,
    Unexpanded,
)
from system.config.training import EvaluateConfig, TrainConfig

__all__ = [
    "AutoConfig", "ClusterConfig", "CurriculumConfig", "EvaluateConfig", "GroupLimit",
    "InfluenceConfig", "IngestConfig", "LoraConfig", "ModelConfig", "RunConfig", "Section",
    "SelectConfig", "SolveConfig", "SourceConfig", "TagConfig", "TinyModelConfig", "TrainConfig",
    "Unexpanded",
]  # fmt: skip
