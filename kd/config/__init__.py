"""Every flag, every method's settings and every preset. No torch here: --help need not wait for it."""

from kd.config.flags import CacheConfig, CompressConfig, DataConfig, FitConfig, RunConfig, StartConfig, ViewConfig
from kd.config.jobs import DistillConfig, Job, Origin, TrainConfig
from kd.config.methods import METHODS, KDConfig, NoneConfig, method_name
from kd.config.named import is_named, named_method

__all__ = [
    "METHODS",
    "CacheConfig",
    "CompressConfig",
    "DataConfig",
    "DistillConfig",
    "FitConfig",
    "Job",
    "KDConfig",
    "NoneConfig",
    "Origin",
    "RunConfig",
    "StartConfig",
    "TrainConfig",
    "ViewConfig",
    "is_named",
    "method_name",
    "named_method",
]
