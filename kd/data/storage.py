"""Choose how images are stored: decoded in memory, or encoded and decoded by workers in every epoch.

`choose_storage` decides, by --decode and by what fits. kd/data/sources.py (`_open_source`) takes the third way with
--stream; it is implemented in kd/data/stream.py.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8

from kd.config import DataConfig
from kd.data.cache import (
    Arrays,
    Decoded,
    Facts,
    cache_root,
    cached,
    decode_split,
    hash_arrays,
    kept_levels,
    open_undecoded,
)
from kd.data.columns import UNLABELLED, Columns, check_columns, find_columns, is_unlabelled, read_labels
from kd.data.metadata import Loaded
from kd.data.rows import LazyImages, MappedRows, Rows, Split
from kd.data.statistics import Statistics, count_levels, iter_blocks
from kd.data.workers import EncodedImages, WorkerRows, find_broken, scan
from kd.errors import require
from kd.utils.images import BrokenImage, broken_images, decode
from kd.utils.system import memory_limit, share_of_cores

SHARE = 0.5  # of memory and of the disk's free space that decoded images may take

SPLITS = ("train", "validation", "test")  # those that are used

UNLABELLED_SPLITS = SPLITS[:2]  # of data without labels: there is nothing to score on its test split

SPLIT_NAMES = {"val": "validation", "valid": "validation"}  # other names of our splits


def used_splits(config: DataConfig) -> tuple[str, ...]:
    """The splits that are read, by our names."""
    return UNLABELLED_SPLITS if config.no_labels else SPLITS


class DataSource(ABC):
    """The splits of an opened data set, from which rows are selected before they become `Rows`."""

    splits: dict[str, Arrays]
    classes: tuple[str, ...]
    storage: str = "in memory"  # in words: how the images are stored, why, and from which columns
    notes: tuple[str, ...] = ()  # what was left out or decided when the data was read

    def check_images(self, splits: list[Arrays]) -> None:  # noqa: B027  most sources have read all images by then
        """Raise UserError for images of these splits that cannot be read, if they were not all read before."""

    def hash_rows(self, train: Arrays) -> None:  # noqa: B027  most sources hash rows when they are asked for it
        """Hash these training rows, if they are not those that `statistics` was given."""

    @abstractmethod
    def statistics(self, train: Arrays) -> Statistics:
        """Fingerprint of the data; mean and deviation of the selected training rows."""

    @abstractmethod
    def rows(self, split: Arrays) -> Rows: ...


def choose_storage(config: DataConfig, key: str, load: Callable[[], Loaded]) -> DataSource:
    """Open the data that `load` gives, in memory or by workers as --decode says or it fits.

    Decoded images are cached under `key`, so that a later start neither loads nor decodes.
    """
    opened, why = None, ""

    def create(folder: Path) -> Facts | None:
        nonlocal opened, why
        opened = OpenedDataset(load(), config)
        fits, why = fits_memory(opened.decoded_bytes, config)
        return opened.decode(folder) if fits else None

    decoded = None if config.decode == "workers" else cached(key, create)
    if decoded is not None:
        size = sum(split.images.nbytes for split in decoded.splits.values())
        source: DataSource = InMemory(decoded)
        source.storage = f"in memory, decoded once ({gigabytes(size)}{why}), {decoded.facts.columns}"
    else:
        opened = opened or OpenedDataset(load(), config)
        source = ByWorkers(opened, config, key)
        source.storage = f"decoded by workers in every epoch ({why or 'as --decode says'}), {opened.columns}"
    return source


def fits_memory(size: int, config: DataConfig) -> tuple[bool, str]:
    """Whether to store `size` bytes of decoded images in memory and on disk, and why."""
    if config.decode == "memory":
        return True, ", as --decode says"
    memory, disk = memory_limit(), shutil.disk_usage(cache_root()).free
    room = f"half of {gigabytes(memory)} of memory and of {gigabytes(disk)} free under KD_CACHE"
    if size <= SHARE * min(memory, disk):
        return True, f", which fit {room}"
    return False, f"their {gigabytes(size)} do not fit {room}"


def gigabytes(size: int) -> str:
    """So many bytes in words."""
    return f"{size / 1e9:.3g} GB" if size >= 1e7 else f"{size / 1e6:.3g} MB"


UNLABELLED_TEST = "the test split has no labels and is left out"


class OpenedDataset:
    """A `datasets` set with its columns found, and the size of its images once decoded."""

    def __init__(self, loaded: Loaded, config: DataConfig):
        every = rename_splits(loaded.splits, config.source)
        train, self.skip_broken = every["train"], config.skip_broken
        self.columns: Columns = find_columns(train.features, train.unique, config)
        self.splits = {name: every[name] for name in used_splits(config) if name in every}
        self.notes = loaded.notes
        if "test" in self.splits and self.columns.label and self._has_unlabelled_test():
            del self.splits["test"]
            self.notes += (UNLABELLED_TEST,)
        for name, rows in self.splits.items():
            check_columns(self.columns, rows.column_names, name, config.source)
            require(len(rows) > 0, f"--data {config.source}: the {name} split is empty")
        self.notes += (*unused_splits(every, config), *filter(None, (self.columns.note,)))
        self.resize_to = config.stored_size or config.image_size
        self.image_size = (self.resize_to,) * 2 if self.resize_to else self._first_size(train)  # height and width

    def _has_unlabelled_test(self) -> bool:
        test, label = self.splits["test"], self.columns.label
        return label not in test.column_names or is_unlabelled(test.unique(label))

    def _first_size(self, train) -> tuple[int, int]:
        """Height and width of the first image that can be read."""
        broken, column = [], self.columns.image
        for row, cells in enumerate(open_undecoded(train, column).select_columns(column)):
            try:
                return decode(cells[column], None, "train", row).shape[1:]
            except BrokenImage as error:
                broken.append(error.what)
        raise broken_images(broken)

    @property
    def decoded_bytes(self) -> int:
        return sum(map(len, self.splits.values())) * 3 * self.image_size[0] * self.image_size[1]

    def decode(self, folder: Path) -> Facts:
        """Decode all splits into `folder`."""
        broken = {
            name: decode_split(rows, self.columns, self.resize_to, folder, name, self.image_size)
            for name, rows in self.splits.items()
        }
        return Facts(self.columns.classes, str(self.columns), (*self.notes, *handle_broken(broken, self.skip_broken)))


def rename_splits(splits: dict, source: str) -> dict:
    """The splits under our names. Raises UserError if two would have one name, or there is no train split."""
    renamed = {SPLIT_NAMES.get(name, name): rows for name, rows in splits.items()}
    require(len(renamed) == len(splits), f"--data {source}: two splits are one here; it has {', '.join(splits)}")
    require("train" in renamed, f"--data {source}: no train split; it has {', '.join(splits)}")
    return renamed


def unused_splits(splits: dict, config: DataConfig) -> tuple[str, ...]:
    others = [str(name) for name in splits if name not in used_splits(config)]
    return (f"splits that are not used: {', '.join(others)}",) if others else ()


def handle_broken(broken: dict[str, list[str]], skip: bool) -> tuple[str, ...]:
    """A sentence on the images of each split that are left out. Raises UserError listing them unless `skip`."""
    every = [message for messages in broken.values() for message in messages]
    if not every:
        return ()
    if not skip:
        raise broken_images(every)
    counts = ", ".join(f"{len(messages)} {name}" for name, messages in broken.items() if messages)
    shown = "; ".join(every[:3]) + ("; ..." if len(every) > 3 else "")
    return (f"left out {len(every)} images that cannot be read: {counts} ({shown})",)


@dataclass(frozen=True)
class MappedImages(LazyImages):
    """Images in a memory map, by row number: a copy would cost its memory in each process of a run."""

    stored: UInt8[np.ndarray, "m 3 h w"]
    image_size: tuple[int, int]
    rows: Int[np.ndarray, "n"]  # numbers of these images in `stored`

    @classmethod
    def all_of(cls, images: UInt8[np.ndarray, "m 3 h w"]) -> "MappedImages":
        return cls(images, tuple(images.shape[2:]), np.arange(len(images)))


class InMemory(DataSource):
    """Decoded images in memory maps."""

    def __init__(self, decoded: Decoded):
        stored = decoded.splits.items()
        self.splits = {name: Arrays(MappedImages.all_of(images), labels) for name, (images, labels) in stored}
        self.classes, self.notes, self.fingerprint = decoded.facts.classes, decoded.facts.notes, decoded.sha256
        self.folder = decoded.folder

    def statistics(self, train: Arrays) -> Statistics:
        stored, rows = train.images.stored, train.images.rows
        pixels = stored.shape[2] * stored.shape[3]
        count = lambda: count_levels(iter_blocks(stored, rows))  # noqa: E731
        levels = count() if self.folder is None else kept_levels(self.folder, rows, pixels, count)
        return Statistics(*levels.mean_and_deviation(), self.fingerprint)

    def rows(self, split: Arrays) -> Rows:
        images, labels = torch.from_numpy(split.images.stored), torch.from_numpy(split.labels)
        if len(labels) == len(images):
            return Split(images, labels)
        return MappedRows(images, torch.from_numpy(split.images.rows), labels)


class WithoutLabels(InMemory):
    """Decoded images whose labels are left out (--no-labels)."""

    def __init__(self, decoded: Decoded):
        splits = {
            name: Arrays(split.images, np.full(len(split.labels), UNLABELLED, np.int64))
            for name, split in decoded.splits.items()
            if name in UNLABELLED_SPLITS
        }
        facts = decoded.facts._replace(classes=())
        super().__init__(Decoded(splits, facts, hash_arrays(splits, ())))


def without_rows(split: Arrays, broken: dict[int, str]) -> Arrays:
    """The split without these rows of it."""
    whole = ~np.isin(np.arange(len(split.labels)), list(broken))
    return Arrays(split.images[whole], split.labels[whole])


class ByWorkers(DataSource):
    """Encoded images, decoded by worker processes."""

    def __init__(self, opened: OpenedDataset, config: DataConfig, key: str):
        self.key, self.classes = key, opened.columns.classes
        workers = share_of_cores() if config.workers is None else config.workers
        column = opened.columns.image
        self.splits, self.notes = {}, opened.notes
        for name, rows in opened.splits.items():
            labels = read_labels(rows, opened.columns, name)
            numbers = np.arange(len(rows))
            cells = open_undecoded(rows, column).select_columns(column)
            images = EncodedImages(cells, column, name, opened.resize_to, opened.image_size, workers, numbers)
            self.splits[name] = Arrays(images, labels)
        if config.skip_broken:
            broken = find_broken(key, {name: split.images for name, split in self.splits.items()})
            self.notes += handle_broken({name: list(found.values()) for name, found in broken.items()}, skip=True)
            self.splits = {name: without_rows(split, broken[name]) for name, split in self.splits.items()}
        self._train, self._train_sha256 = None, ""

    def statistics(self, train: Arrays) -> Statistics:
        self._train = train.images
        statistics, self._train_sha256 = scan(self.key, self.splits, self.classes, train)
        return statistics

    def hash_rows(self, train: Arrays) -> None:
        self.statistics(train)

    def rows(self, split: Arrays) -> Rows:
        sha256 = self._train_sha256 if split.images is self._train else ""
        return WorkerRows(split.images, torch.from_numpy(split.labels), sha256)
