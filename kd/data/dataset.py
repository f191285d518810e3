"""Load any image classification set as three splits of uint8 images.

kd/data/sources.py finds the data and kd/data/storage.py chooses how it is stored. The validation split is held out of
the training split, by class; the test split is the data's own and is read once, at the end of a run.
"""

from dataclasses import dataclass

import numpy as np

from kd.config import DataConfig
from kd.data.cache import Arrays
from kd.data.rows import Rows
from kd.data.sources import BUILT_IN, find_source, with_set_defaults
from kd.data.splits import hold_out, long_tail, select
from kd.errors import require
from kd.utils.console import print_once


@dataclass(frozen=True)
class Data:
    train: Rows
    val: Rows | None
    test: Rows
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of the training split, per channel, as shares of 255
    std: tuple[float, ...]
    fingerprint: str  # sha256 of all rows and class names; of a stream, of its files' names, sizes and times
    size: tuple[int, int]  # height and width of every image as networks see it
    storage: str = "in memory"  # in words: how the images are stored, and why


def load_data(config: DataConfig) -> Data:
    """Load the three splits of `config.source`.

    Raises: UserError for a source that does not exist or cannot be reached, a broken row, a label out of range.
    """
    config = with_set_defaults(config)
    config.check_sizes()
    source = find_source(config)
    splits, classes = source.splits, source.classes
    if config.classes is not None:
        require(config.classes <= len(classes), f"--classes {config.classes}: {config.source} has {len(classes)}")
        classes = classes[: config.classes]
        splits = {name: select(split, split.labels < config.classes) for name, split in splits.items()}
    train, val, test = splits["train"], splits.get("validation"), splits.get("test")
    if test is None:  # the literature reports a set's validation split if that is all it has
        val, test = None, val
    require(test is not None, f"--data {config.source}: only a train split; a test (or validation) split is needed")
    if val is None:
        train, val = hold_out(train, config.val_fraction, config.split_seed)
    # After the hold-out: validation keeps the test split's class frequencies and is the same for every --imbalance.
    train = long_tail(train, config.imbalance, len(classes), config.split_seed)
    for name, split in (("train", train), ("validation", val), ("test", test)):
        require(split is None or len(split.labels) > 0, f"--data {config.source}: the {name} split is empty")
    _print_summary(config, source.storage, {"training": train, "validation": val, "test": test}, classes)
    statistics = source.statistics(train)
    train, val, test = (split and source.rows(split) for split in (train, val, test))
    size = (config.image_size,) * 2 if config.image_size else train.size
    return Data(train, val, test, classes, *statistics, size, source.storage)


def _print_summary(
    config: DataConfig, storage: str, splits: dict[str, Arrays | None], classes: tuple[str, ...]
) -> None:
    """Print storage and sizes of the splits, and test classes without training images."""
    sizes = ", ".join(f"{len(split.labels)} {name}" for name, split in splits.items() if split is not None)
    if config.source not in BUILT_IN:
        print_once(f"data: {storage}; {sizes} images of {len(classes)} classes")
    missing = np.setdiff1d(splits["test"].labels, splits["training"].labels)
    if len(missing):
        names = ", ".join(classes[label] for label in missing[:3].tolist())
        print_once(f"data: classes of the test split without a training image: {len(missing)} ({names})")
