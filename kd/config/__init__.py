"""Every flag, every method's settings and every preset. No torch here: --help need not wait for it."""

from kd.config.flags import CacheConfig, CompressConfig, DataConfig, FitConfig, RunConfig, StartConfig, ViewConfig
from kd.config.jobs import DistillConfig, Job, Origin, PresetName, TrainConfig
from kd.config.methods import METHODS, KDConfig, Method, NoneConfig, method_name

__all__ = [
    "METHODS",
    "CacheConfig",
    "CompressConfig",
    "DataConfig",
    "DistillConfig",
    "FitConfig",
    "Job",
    "KDConfig",
    "Method",
    "NoneConfig",
    "Origin",
    "PresetName",
    "RunConfig",
    "StartConfig",
    "TrainConfig",
    "ViewConfig",
    "method_name",
]
