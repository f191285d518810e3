"""Images that worker processes decode in every epoch, for sets whose decoded images do not fit.

Memory holds a few batches, however many images there are. Each image is decoded and resized by the same function as for
other storage, and augmented on the device, so that a run gets the same bytes however its data is stored.
"""

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.data.cache import Arrays, locked
from kd.data.rows import LazyImages, Rows
from kd.data.statistics import ChannelHistogram, DatasetHash, Statistics
from kd.errors import UserError
from kd.utils.files import read_json, write_json
from kd.utils.images import decode_to

BLOCK = 256  # images that are scanned at a time before training

SIGNAL_DELAY = 0.5  # seconds within which the system reports that a worker died

PREFETCH = 2  # batches that each worker decodes ahead


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

    def batches(self, indices: Sequence[Tensor], pinned: bool = False) -> Iterator[Tensor]:
        """The images (uint8 b x 3 x h x w) of each index (b) in `indices`.

        Raises UserError naming the row that cannot be read.
        """
        loader = DataLoader(
            _Decoder(self),
            sampler=[self.rows[index.numpy()] for index in indices],
            batch_size=None,  # each item of the sampler is a whole batch
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            pin_memory=pinned,
            generator=torch.Generator(),  # the loader draws a seed for its workers, not to be taken from torch's own
            collate_fn=_unchanged,
        )
        for images in _receive(loader):
            if isinstance(images, str):
                raise UserError(images)
            yield images

    def iter_blocks(self) -> Iterator[np.ndarray]:
        """All images in order (b x 3 x h x w), a block at a time, with a progress bar on a terminal."""
        blocks = torch.arange(len(self.rows)).split(BLOCK)
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


def _receive(loader: DataLoader) -> Iterator[Tensor | str]:
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:  # the worker died while sending a batch, which torch does not notice
        # A little later torch's signal handler raises in whatever code runs: better here than in error handling.
        time.sleep(SIGNAL_DELAY)
        raise RuntimeError(f"a DataLoader worker died ({error!r})") from error


def _unchanged(batch: Tensor | str) -> Tensor | str:
    return batch


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
        for images in self.images.batches(indices, pinned=device.type == "cuda"):
            yield images.to(device, non_blocking=True)


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
            write_json(path, _scan(splits, classes, train))
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
