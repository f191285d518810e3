"""Data read in the order it is stored in, for what neither memory nor disk can hold.

Rows keep the number that they have in the unshuffled stream, so labels, hold-out, a teacher's kept answers and resuming
work as they do elsewhere. Only the order of training differs: an epoch shuffles the shards, and then the rows within
every so many of them (--shuffle-rows), as a pure function of seed and epoch. Every process reads the whole stream and
decodes its own share.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kd.errors import UserError
from kd.images.pictures import decode_to
from kd.images.rows import Rows, Selected
from kd.images.stream_order import stream_order

OPEN = 4  # shards that are read from at a time: where one window ends in the middle of some, the next goes on


@dataclass(frozen=True)
class Streamed(Selected):
    """Images of a split, read from its shards."""

    stream: object  # a datasets.IterableDataset of undecoded images
    column: str
    split: str
    size: int | None  # to bring them to
    sides: tuple[int, int]  # height and width that each has then
    window: int
    threads: int
    starts: Int[np.ndarray, "m"]  # the first row of each shard, and behind the last one
    rows: Int[np.ndarray, "n"]  # which of the stored ones

    def order(self, seed: int, epoch: int) -> Int[np.ndarray, "n"]:
        return stream_order(self.shards_of(self.rows), self.window, seed, epoch)

    def shards_of(self, rows: Int[np.ndarray, "k"]) -> Int[np.ndarray, "k"]:
        return np.searchsorted(self.starts, rows, side="right") - 1

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images (uint8 b x 3 x h x w) of each of `indices` (b) in turn; quick in an order of `stream_order`.

        About a window of stored images is held for later, another one is read ahead, and one batch decoded.
        """
        wanted = [self.rows[index.numpy()] for index in indices]
        reader, deep = _Reader(self, wanted), self.window // max(map(len, wanted), default=1) + 1
        reading, decoding = ThreadPoolExecutor(1), ThreadPoolExecutor(self.threads)
        try:
            read = _ahead((reading.submit(reader.cells, rows) for rows in wanted), deep)
            for images in _ahead((self._decoded(decoding, *batch) for batch in zip(wanted, read)), 1):
                yield torch.from_numpy(np.stack([image.result() for image in images]))
        finally:
            for pool in (reading, decoding):
                pool.shutdown(cancel_futures=True)

    def _decoded(self, pool: ThreadPoolExecutor, rows: np.ndarray, cells: Future) -> list[Future]:
        how = (self.size, self.split)
        return [pool.submit(decode_to, self.sides, cell, *how, row) for row, cell in zip(rows.tolist(), cells.result())]


def _ahead(items: Iterator, count: int) -> Iterator:
    """The items, each once `count` more have been begun."""
    begun: deque = deque()
    for item in items:
        begun.append(item)
        if len(begun) > count:
            yield begun.popleft()
    yield from begun


@contextmanager
def breaking_off(where: str) -> Iterator[None]:
    """Raises UserError that says where, for whatever the network or a file answers with."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"the stream broke off at {where} ({type(error).__name__}: {error}): see to the network or the files, then"
            " continue with --resume"
        ) from error


class _Reader:
    """Reads rows by number, each shard once from front to back, and holds what it passes and is wanted later.

    In an order of `stream_order` that is two windows of rows and a batch at most.
    """

    def __init__(self, images: Streamed, wanted: list[np.ndarray]):
        self.images, self.held = images, {}
        self.rows = np.concatenate([*wanted, np.empty(0, np.int64)])
        self.shards, self.at = images.shards_of(self.rows), 0  # how many of the rows have been given out
        self.wanted = np.zeros(images.starts[-1], bool)
        for rows in wanted:
            self.wanted[rows] = True
        self.opened: dict[int, tuple[int, Iterator]] = {}  # shard -> its next row, and what follows

    def cells(self, rows: np.ndarray) -> list[dict | None]:
        """The stored images of these rows. Raises UserError where the stream breaks off."""
        for row, shard in zip(rows.tolist(), self.images.shards_of(rows).tolist()):
            with breaking_off(f"{self.images.split} row {row}"):
                if row not in self.held:
                    self._read_to(row, shard)
            self.at += 1
        found = [self.held[row] for row in rows.tolist()]
        for row in rows.tolist():
            self.held.pop(row, None)
            self.wanted[row] = False
        return found

    def _read_to(self, row: int, shard: int) -> None:
        """Up to and with `row`, and on to the last of the shard's rows that the next window of them asks for.

        A window may lie in any number of shards, which cannot all stay open until each has given its rows one by one.
        """
        images, soon = self.images, slice(self.at, self.at + self.images.window)
        last = int(self.rows[soon][self.shards[soon] == shard].max(initial=row))
        self.wanted[row] = True  # a row may be asked for twice
        at, rest = self.opened.pop(shard, (row + 1, None))
        if at > row:
            start, end = images.starts[shard : shard + 2].tolist()
            at = start + int(self.wanted[start:end].argmax())
            part = images.stream.shard(num_shards=len(images.starts) - 1, index=shard)
            rest = iter(part.skip(at - start))
        for number, stored in zip(range(at, last + 1), rest, strict=False):
            if self.wanted[number]:
                self.held[number] = stored[images.column]
        if row not in self.held:
            raise EOFError("it has fewer rows than when they were counted")
        if self.wanted[last + 1 : images.starts[shard + 1]].any():
            self.opened[shard] = (last + 1, rest)
        while len(self.opened) > OPEN:
            self.opened.pop(next(iter(self.opened)))


@dataclass(frozen=True)
class StreamedRows(Rows):
    """A split that is streamed."""

    images: Streamed
    labels: Int[Tensor, "n"]
    fingerprint: str

    @property
    def size(self) -> tuple[int, int]:
        return self.images.sides

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.fingerprint.encode() + self.images.rows.tobytes()).hexdigest()

    def order(self, seed: int, epoch: int) -> Int[Tensor, "n"]:
        return torch.from_numpy(self.images.order(seed, epoch))

    def sample(self, count: int) -> Int[Tensor, "k"]:
        return torch.arange(count).clamp(max=len(self.labels) - 1)

    def batches(self, indices: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        for images in self.images.batches(indices):
            yield (images.pin_memory() if device.type == "cuda" else images).to(device, non_blocking=True)
