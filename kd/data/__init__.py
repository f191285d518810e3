"""Any data set as three splits, and their batches."""

from kd.data.dataset import Data, load_data
from kd.data.rows import Split

__all__ = ["Data", "Split", "load_data"]
