"""Images decoded by worker processes when they are asked for, from the data as it is stored.

For sets whose decoded images do not fit: memory holds a few batches, however many images there are. Each image is
brought to its stored size by the same function as for the other ways, and the random views happen on the device, so
that a run gets the same bytes whichever way its data is held.
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
from kd.data.rows import Rows, Selected
from kd.data.statistics import ChannelHistogram, DatasetHash, Facts
from kd.errors import UserError
from kd.utils.files import read_json, write_json
from kd.utils.images import decode_to

BLOCK = 256  # images that are looked at together before training


SIGNAL = 0.5  # seconds in which the system tells of a process that died


AHEAD = 2  # batches that each worker has ready


@dataclass(frozen=True)
class Encoded(Selected, Dataset):
    """Images of a split as they are stored; a worker has its own copy of this and is sent row numbers."""

    stored: object  # a datasets.Dataset whose images are not decoded
    column: str
    split: str
    size: int | None  # to bring them to
    sides: tuple[int, int]  # height and width that each has then
    workers: int
    rows: Int[np.ndarray, "n"]  # which of the stored ones

    def batches(self, indices: Sequence[Tensor], pinned: bool = False) -> Iterator[Tensor]:
        """The images (uint8 b x 3 x h x w) of each of `indices` (b) in turn.

        Raises UserError naming the row that cannot be read.
        """
        loader = DataLoader(
            _Reader(self),
            sampler=[self.rows[index.numpy()] for index in indices],
            batch_size=None,  # each index is a whole batch
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            pin_memory=pinned,
            generator=torch.Generator(),  # it draws a number for its workers, not to be taken from ours
            collate_fn=_unchanged,
        )
        for images in _receive(loader):
            if isinstance(images, str):
                raise UserError(images)
            yield images

    def in_order(self) -> Iterator[np.ndarray]:
        """All images (b x 3 x h x w), a block at a time, with a bar on a terminal."""
        blocks = torch.arange(len(self.rows)).split(BLOCK)
        title, hidden = f"looking at {self.split}", not sys.stderr.isatty()
        images = zip(blocks, self.batches(blocks))
        for _, block in track(images, title, len(blocks), disable=hidden, transient=True):
            yield block.numpy()


class _Reader(Dataset):
    """What runs in a worker: rows to pixels, or the words for what is wrong with one of them."""

    def __init__(self, images: Encoded):
        self.images = images

    def __getitem__(self, rows: Int[np.ndarray, "b"]) -> Tensor | str:
        images = self.images
        cells = images.stored[rows.tolist()][images.column]
        batch = np.empty((len(rows), 3, *images.sides), np.uint8)
        try:
            for place, (row, cell) in enumerate(zip(rows.tolist(), cells)):
                batch[place] = decode_to(images.sides, cell, images.size, images.split, row)
        except UserError as error:  # raised in a worker it would come out as a traceback
            return str(error)
        return torch.from_numpy(batch)


def _receive(loader: DataLoader) -> Iterator[Tensor | str]:
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:  # it died while it handed a batch over, which torch does not notice
        time.sleep(
            SIGNAL
        )  # or does a little later, by raising wherever it finds us: better here than in an error's words
        raise RuntimeError(f"a DataLoader worker died ({error!r})") from error


def _unchanged(batch: Tensor | str) -> Tensor | str:
    return batch


@dataclass(frozen=True)
class StoredRows(Rows):
    """A split whose images are decoded by workers."""

    images: Encoded
    labels: Int[Tensor, "n"]
    known_sha256: str = ""  # of the decoded rows, of the training split alone

    @property
    def size(self) -> tuple[int, int]:
        return self.images.sides

    @property
    def sha256(self) -> str:
        if not self.known_sha256:
            raise RuntimeError("only the training split's pixels were all looked at")
        return self.known_sha256

    def batches(self, indices: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        for images in self.images.batches(indices, pinned=device.type == "cuda"):
            yield images.to(device, non_blocking=True)


def scan(key: str, splits: dict[str, Arrays], classes: tuple[str, ...], train: Arrays) -> tuple[Facts, str]:
    """The very facts that decoded arrays would give, and the sha256 of the training rows `train`.

    Decodes everything once without keeping it, which also finds every row that cannot be read before training starts;
    the result is kept.
    """
    chosen = hashlib.sha256(np.ascontiguousarray(train.images.rows)).hexdigest()[:16]
    with locked(f"{key}.workers") as folder:
        path = folder / f"{chosen}.json"
        if not path.exists():
            folder.mkdir(exist_ok=True)
            write_json(path, _scan(splits, classes, train))
        found = read_json(path)
    return Facts(tuple(found["mean"]), tuple(found["std"]), found["fingerprint"]), found["train_sha256"]


def _scan(splits: dict[str, Arrays], classes: tuple[str, ...], train: Arrays) -> dict:
    whole, levels, part = DatasetHash(splits, classes), ChannelHistogram(), hashlib.sha256()
    for name in sorted(splits):
        images, start = splits[name].images, 0
        wanted = np.isin(images.rows, train.images.rows) & (name == train.images.split)
        whole.begin(images.shape)
        for block in images.in_order():
            whole.update(block)
            kept = block[wanted[start : start + len(block)]]
            levels.add(kept)
            part.update(kept)
            start += len(block)
        whole.update(splits[name].labels)
    part.update(train.labels)
    mean, std = levels.mean_and_deviation()
    return {"mean": mean, "std": std, "fingerprint": whole.hexdigest(), "train_sha256": part.hexdigest()}
