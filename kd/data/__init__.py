"""Load any image classification data set as three splits, and make augmented batches of them."""

from kd.data.dataset import Data, load_data
from kd.data.rows import Split

__all__ = ["Data", "Split", "load_data"]
