"""The flags of both scripts, by what they are about; each part checks its own values. No torch here."""

from kd.flags.cache import CacheConfig
from kd.flags.compress import CompressConfig
from kd.flags.data import DataConfig
from kd.flags.fit import FitConfig
from kd.flags.run import RunConfig
from kd.flags.views import ViewConfig

__all__ = ["CacheConfig", "CompressConfig", "DataConfig", "FitConfig", "RunConfig", "ViewConfig"]
