"""Images that worker processes decode in every epoch, for sets whose decoded images do not fit.

Memory holds a few batches, however many images there are. Each image is decoded and resized by the same function as for
other storage, and augmented on the device, so that a run gets the same bytes however its data is stored.
"""

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.data.cache import Arrays, locked
from kd.data.rows import LazyImages, Rows
from kd.data.statistics import ChannelHistogram, DatasetHash, Statistics
from kd.errors import UserError, require
from kd.utils.files import read_json, write_json
from kd.utils.images import BrokenImage, broken_images, decode, decode_to

BLOCK = 256  # images that are scanned at a time before training, if their pixels are no more than

BLOCK_BYTES = 2**22

SHARED = Path("/dev/shm")  # where workers leave their batches

TIMEOUT = 600  # seconds without a batch after which the workers are given up

SIGNAL_DELAY = 0.5  # seconds within which the system reports that a worker died

PREFETCH = 2  # batches that each worker decodes ahead

IN_USE = 2  # batches of the main process, the one that it works on and the one that it receives


@dataclass(frozen=True)
class EncodedImages(LazyImages, Dataset):
    """Encoded images of a split. Each worker has a copy of this object and is sent row numbers."""

    stored: object  # a datasets.Dataset whose images are not decoded
    column: str
    split: str
    resize_to: int | None
    image_size: tuple[int, int]  # height and width of the decoded images
    workers: int
    rows: Int[np.ndarray, "n"]  # numbers of these images in `stored`

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images (uint8 b x 3 x h x w) of each index (b) in `indices`.

        Raises UserError naming the row that cannot be read.
        """
        return _readable(self._load(_Decoder(self), indices))

    def find_broken(self) -> dict[int, str]:
        """Place and message of each image that cannot be read."""
        blocks = self._blocks()
        found = zip(blocks, self._load(_Checker(self), blocks))
        return {int(block[place]): message for block, part in found for place, message in part.items()}

    def _blocks(self) -> Sequence[Tensor]:
        """All rows in parts of few pixels."""
        return torch.arange(len(self.rows)).split(max(min(BLOCK, BLOCK_BYTES // self._image_bytes), 1))

    @property
    def _image_bytes(self) -> int:
        return 3 * self.image_size[0] * self.image_size[1]

    def _load(self, decoder: Dataset, indices: Sequence[Tensor]) -> Iterator:
        """What `decoder` makes of each index, in worker processes."""
        return _receive(self.loader(decoder, self.rows_in_memory(indices)))

    def rows_in_memory(self, indices: Sequence[Tensor]) -> list[Int[np.ndarray, "..."]]:
        """The numbers in `stored` of each index. Raises UserError if batches of that size do not fit the memory that
        workers share."""
        if self.workers:
            check_shared_memory(self.workers, max(map(len, indices), default=0) * self._image_bytes)
        return [self.rows[index.numpy()] for index in indices]

    def loader(
        self, decoder: Dataset, rows: list[Int[np.ndarray, "..."]], pinned: bool = False, kept: bool = False
    ) -> DataLoader:
        """Makes `decoder`'s of each batch of `rows`. If it is `kept`, its workers live as long as it does."""
        return DataLoader(
            decoder,
            sampler=rows,
            batch_size=None,  # each item of the sampler is a whole batch
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            timeout=TIMEOUT if self.workers else 0,
            pin_memory=pinned,
            generator=torch.Generator(),  # the loader draws a seed for its workers, not to be taken from torch's own
            collate_fn=_unchanged,
            persistent_workers=kept and self.workers > 0,
        )

    def iter_blocks(self) -> Iterator[np.ndarray]:
        """All images in order (b x 3 x h x w), a block at a time, with a progress bar on a terminal."""
        blocks = self._blocks()
        title, hidden = f"scanning {self.split}", not sys.stderr.isatty()
        images = zip(blocks, self.batches(blocks))
        for _, block in track(images, title, len(blocks), disable=hidden, transient=True):
            yield block.numpy()


class _Decoder(Dataset):
    """Runs in a worker: decodes a batch of rows to pixels, or returns the error's message for a broken row."""

    def __init__(self, images: EncodedImages):
        self.images = images

    def __getitem__(self, rows: Int[np.ndarray, "b"]) -> Tensor | str:
        images = self.images
        cells = images.stored[rows.tolist()][images.column]
        batch = np.empty((len(rows), 3, *images.image_size), np.uint8)
        try:
            for place, (row, cell) in enumerate(zip(rows.tolist(), cells)):
                batch[place] = decode_to(images.image_size, cell, images.resize_to, images.split, row)
        except UserError as error:  # raised in a worker, it would be wrapped in a traceback
            return str(error)
        return torch.from_numpy(batch)


class _Checker(Dataset):
    """Runs in a worker: the place in a batch and the message of each row that cannot be read."""

    def __init__(self, images: EncodedImages):
        self.images = images

    def __getitem__(self, rows: Int[np.ndarray, "b"]) -> dict[int, str]:
        images, found = self.images, {}
        cells = images.stored[rows.tolist()][images.column]
        for place, (row, cell) in enumerate(zip(rows.tolist(), cells)):
            try:
                decode(cell, images.resize_to, images.split, row)
            except BrokenImage as error:
                found[place] = error.what
        return found


def check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Raise UserError if batches of `batch_bytes` that wait for their turn do not fit the memory that workers share.

    A worker that finds it full sends no batch, nor that it failed.
    """
    if not SHARED.is_dir():
        return
    free = shutil.disk_usage(SHARED).free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = (workers * PREFETCH + IN_USE) * batch_bytes
    fitting = max((free // max(batch_bytes, 1) - IN_USE) // PREFETCH, 0)
    require(
        needed <= free,
        f"--workers {workers}: batches of {batch_bytes / 1e6:.3g} MB that wait for their turn take {needed / 1e6:.3g}"
        f" MB, and {SHARED} has {free / 1e6:.3g} MB free for them: give --workers {fitting}, or start the container"
        f" with a larger --shm-size",
    )


def _receive(loader: DataLoader) -> Iterator[Tensor | str | dict]:
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:  # the worker died while sending a batch, which torch does not notice
        # A little later torch's signal handler raises in whatever code runs: better here than in error handling.
        time.sleep(SIGNAL_DELAY)
        raise RuntimeError(f"a DataLoader worker died ({error!r})") from error
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        free = f", of which {shutil.disk_usage(SHARED).free / 1e6:.3g} MB are free" if SHARED.is_dir() else ""
        raise UserError(
            f"no worker sent a batch in {TIMEOUT} seconds: give fewer --workers, or 0, and continue with --resume; they"
            f" share {SHARED}{free} (a container's --shm-size), and wait for the disk that has the images"
        ) from error


def _readable(batches: Iterator[Tensor | str]) -> Iterator[Tensor]:
    """The batches, or UserError with the message of a row that cannot be read."""
    for images in batches:
        if isinstance(images, str):
            raise UserError(images)
        yield images


def _unchanged(batch: Tensor | str | dict) -> Tensor | str | dict:
    return batch


class KeptWorkers:
    """Worker processes that decode one epoch after another: they start with the first, and end by `close`."""

    def __init__(self, images: EncodedImages):
        self.images, self.busy = images, False
        self.loader: DataLoader | None = None

    def batches(self, indices: Sequence[Tensor], pinned: bool) -> Iterator[Tensor]:
        """As EncodedImages.batches; `pinned`: in memory from which a GPU copies while it computes."""
        if self.busy:  # in the middle of other batches of this split, which the same workers cannot leave
            yield from self.images.batches(indices)
            return
        rows = self.images.rows_in_memory(indices)
        if self.loader is None or self.loader.pin_memory != pinned:
            self.loader = self.images.loader(_Decoder(self.images), [], pinned, kept=True)
        self.loader.sampler[:] = rows
        self.busy = True
        try:
            yield from _readable(_receive(self.loader))
        except Exception:
            self.close()
            raise
        finally:
            self.busy = False

    def close(self) -> None:
        """End the processes; the next batches start new ones."""
        self.loader = None  # they end with it


@dataclass(frozen=True)
class WorkerRows(Rows):
    """A split whose images are decoded by workers."""

    images: EncodedImages
    labels: Int[Tensor, "n"]
    known_sha256: str = ""  # of the decoded rows; of the training split only

    @property
    def size(self) -> tuple[int, int]:
        return self.images.image_size

    @property
    def sha256(self) -> str:
        if not self.known_sha256:
            raise RuntimeError("only the training split's pixels are hashed")
        return self.known_sha256

    def batches(self, indices: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        for images in self._workers.batches(indices, pinned=device.type == "cuda"):
            yield images.to(device, non_blocking=True)

    def close(self) -> None:
        self._workers.close()

    @cached_property
    def _workers(self) -> KeptWorkers:
        return KeptWorkers(self.images)


def find_broken(key: str, splits: dict[str, EncodedImages]) -> dict[str, dict[int, str]]:
    """Row and message of each image of each split that cannot be read; decodes all once, and caches what it finds."""
    with locked(f"{key}.workers") as folder:
        path = folder / "broken.json"
        if not path.exists():
            folder.mkdir(exist_ok=True)
            found = {name: images.find_broken() for name, images in splits.items()}
            write_json(path, found)
        known = read_json(path)
    return {name: {int(row): message for row, message in found.items()} for name, found in known.items()}


def scan(key: str, splits: dict[str, Arrays], classes: tuple[str, ...], train: Arrays) -> tuple[Statistics, str]:
    """The statistics that decoded arrays would give, and the sha256 of the training rows `train`.

    Decodes everything once without storing it, which also finds every unreadable row before training starts. The
    result is cached.
    """
    train_rows = hashlib.sha256(np.ascontiguousarray(train.images.rows)).hexdigest()[:16]
    with locked(f"{key}.workers") as folder:
        path = folder / f"{train_rows}.json"
        if not path.exists():
            folder.mkdir(exist_ok=True)
            try:
                write_json(path, _scan(splits, classes, train))
            except UserError:  # of the first broken image, if it is not another
                every = [message for split in splits.values() for message in split.images.find_broken().values()]
                if every:
                    raise broken_images(every) from None
                raise
        known = read_json(path)
    statistics = Statistics(tuple(known["mean"]), tuple(known["std"]), known["fingerprint"])
    return statistics, known["train_sha256"]


def _scan(splits: dict[str, Arrays], classes: tuple[str, ...], train: Arrays) -> dict:
    dataset_hash, histogram, train_hash = DatasetHash(splits, classes), ChannelHistogram(), hashlib.sha256()
    for name in sorted(splits):
        images, start = splits[name].images, 0
        in_train = np.isin(images.rows, train.images.rows) & (name == train.images.split)
        dataset_hash.begin(images.shape)
        for block in images.iter_blocks():
            dataset_hash.update(block)
            train_block = block[in_train[start : start + len(block)]]
            histogram.add(train_block)
            train_hash.update(train_block)
            start += len(block)
        dataset_hash.update(splits[name].labels)
    train_hash.update(train.labels)
    mean, std = histogram.mean_and_deviation()
    return {
        "mean": mean,
        "std": std,
        "fingerprint": dataset_hash.hexdigest(),
        "train_sha256": train_hash.hexdigest(),
    }
