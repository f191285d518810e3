"""The three ways of holding data: decoded in memory, decoded by workers from where it lies, or streamed."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8

from kd.config import DataConfig
from kd.data.cache import Arrays, cache_root, cached, decode_split, open_undecoded
from kd.data.columns import Columns, check_columns, find_columns, numbers_of
from kd.data.rows import Mapped, Rows, Selected, Split
from kd.data.statistics import Facts, blocks_of, channel_statistics
from kd.data.workers import Encoded, StoredRows, scan
from kd.errors import require
from kd.utils.images import decode
from kd.utils.system import memory_limit, share_of_cores

SHARE = 0.5  # of the memory and of the disk's free space that decoded images may take


NAMES = {"val": "validation", "valid": "validation"}


class DataSource(ABC):
    """Splits by name, to select from, and what is made of the selected ones."""

    splits: dict[str, Arrays]
    classes: tuple[str, ...]
    how: str = "in memory"  # in words: which of the three it is, and why

    @abstractmethod
    def facts(self, train: Arrays) -> Facts:
        """Of the data, with the training rows that were kept."""

    @abstractmethod
    def rows(self, split: Arrays) -> Rows: ...


@dataclass(frozen=True)
class Decoded(Selected):
    """Rows of a memory map, named and not copied: each process of a run would hold a copy of its own."""

    stored: UInt8[np.ndarray, "m 3 h w"]
    sides: tuple[int, int]  # height and width of each
    rows: Int[np.ndarray, "n"]  # which of the stored ones

    @classmethod
    def all_of(cls, images: UInt8[np.ndarray, "m 3 h w"]) -> "Decoded":
        return cls(images, tuple(images.shape[2:]), np.arange(len(images)))


class InMemory(DataSource):
    """Decoded images, in memory maps."""

    def __init__(self, splits: dict[str, Arrays], classes: tuple[str, ...], fingerprint: str):
        self.splits = {name: Arrays(Decoded.all_of(images), labels) for name, (images, labels) in splits.items()}
        self.classes, self.fingerprint = classes, fingerprint

    def facts(self, train: Arrays) -> Facts:
        return Facts(*channel_statistics(blocks_of(train.images.stored, train.images.rows)), self.fingerprint)

    def rows(self, split: Arrays) -> Rows:
        images, labels = torch.from_numpy(split.images.stored), torch.from_numpy(split.labels)
        whole = len(labels) == len(images)
        return Split(images, labels) if whole else Mapped(images, torch.from_numpy(split.images.rows), labels)


class ByWorkers(DataSource):
    """Images as they are stored, for workers to decode."""

    def __init__(self, opened: "OpenedDataset", config: DataConfig, key: str):
        self.key, self.classes = key, opened.columns.classes
        workers = share_of_cores() if config.workers is None else config.workers
        sides, column = opened.sides, opened.columns.image
        self.splits = {}
        for name, rows in opened.splits.items():
            labels = numbers_of(rows[opened.columns.label], self.classes, name)
            numbers = np.arange(len(rows))
            cells = open_undecoded(rows, column).select_columns(column)
            self.splits[name] = Arrays(Encoded(cells, column, name, opened.size, sides, workers, numbers), labels)
        self._train, self._train_sha256 = None, ""

    def facts(self, train: Arrays) -> Facts:
        self._train = train.images
        found, self._train_sha256 = scan(self.key, self.splits, self.classes, train)
        return found

    def rows(self, split: Arrays) -> Rows:
        known = self._train_sha256 if split.images is self._train else ""
        return StoredRows(split.images, torch.from_numpy(split.labels), known)


class OpenedDataset:
    """A `datasets` set with its columns found, and the size that its images have or get."""

    def __init__(self, dataset, config: DataConfig):
        splits = {NAMES.get(name, name): rows for name, rows in dataset.items()}
        require("train" in splits, f"--data {config.source}: no train split; it has {', '.join(splits)}")
        train = splits["train"]
        self.columns: Columns = find_columns(train.features, train.unique, config.label, config.source)
        self.splits = {name: splits[name] for name in ("train", "validation", "test") if name in splits}
        for name, rows in self.splits.items():
            check_columns(self.columns, rows.column_names, name, config.source)
            require(len(rows) > 0, f"the {name} split is empty")
        self.size = config.stored_size or config.image_size
        first = open_undecoded(train, self.columns.image)[0][self.columns.image]
        self.sides = (self.size, self.size) if self.size else decode(first, None, "train", 0).shape[1:]

    @property
    def decoded_bytes(self) -> int:
        return sum(map(len, self.splits.values())) * 3 * self.sides[0] * self.sides[1]

    def decode(self, folder: Path) -> tuple[str, ...]:
        for name, rows in self.splits.items():
            decode_split(rows, self.columns, self.size, folder, name, self.sides)
        return self.columns.classes


def choose_storage(config: DataConfig, key: str, load: Callable) -> DataSource:
    """The data that `load` opens (`datasets` sets by split), held as the flags say or as it fits."""
    opened, why = None, ""

    def produce(folder: Path) -> tuple[str, ...] | None:
        nonlocal opened, why
        opened = OpenedDataset(load(), config)
        keep, why = fits_memory(opened.decoded_bytes, config)
        return opened.decode(folder) if keep else None

    found = None if config.decode == "workers" else cached(key, produce)
    if found is not None:
        size = sum(split.images.nbytes for split in found[0].values())
        source: DataSource = InMemory(*found)
        source.how = f"in memory, decoded once ({_gigabytes(size)}{why})"
    else:
        source = ByWorkers(opened or OpenedDataset(load(), config), config, key)
        source.how = f"decoded by workers in every epoch ({why or 'as --decode says'})"
    return source


def fits_memory(size: int, config: DataConfig) -> tuple[bool, str]:
    """Whether `size` bytes of decoded images are to be kept, and why."""
    if config.decode == "memory":
        return True, ", as --decode says"
    memory, disk = memory_limit(), shutil.disk_usage(cache_root()).free
    room = f"half of {_gigabytes(memory)} of memory and of {_gigabytes(disk)} free under KD_CACHE"
    if size <= SHARE * min(memory, disk):
        return True, f", which fit {room}"
    return False, f"their {_gigabytes(size)} do not fit {room}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
