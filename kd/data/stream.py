"""Data read in the order it is stored in, for what neither memory nor disk can hold.

Rows keep the number that they have in the unshuffled stream, so labels, hold-out, a teacher's kept answers and resuming
work as they do elsewhere. Only the order of training differs: an epoch shuffles the shards, and then the rows within
every so many of them (--shuffle-rows), as a pure function of seed and epoch. Every process reads the whole stream and
decodes its own share.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from rich.progress import track
from torch import Tensor

from kd.config import DataConfig
from kd.data.cache import Arrays, locked, open_undecoded
from kd.data.columns import check_columns, find_columns, numbers_of
from kd.data.rows import Rows, Selected
from kd.data.statistics import Facts, channel_statistics
from kd.data.storage import NAMES, DataSource
from kd.errors import UserError, require
from kd.utils import rng
from kd.utils.console import console, print_once
from kd.utils.files import read_json, write_json
from kd.utils.images import decode, decode_to
from kd.utils.system import share_of_cores

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
            read = _prefetch((reading.submit(reader.cells, rows) for rows in wanted), deep)
            for images in _prefetch((self._decoded(decoding, *batch) for batch in zip(wanted, read)), 1):
                yield torch.from_numpy(np.stack([image.result() for image in images]))
        finally:
            for pool in (reading, decoding):
                pool.shutdown(cancel_futures=True)

    def _decoded(self, pool: ThreadPoolExecutor, rows: np.ndarray, cells: Future) -> list[Future]:
        how = (self.size, self.split)
        return [pool.submit(decode_to, self.sides, cell, *how, row) for row, cell in zip(rows.tolist(), cells.result())]


def _prefetch(items: Iterator, count: int) -> Iterator:
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


#: (kd.images.stream_order) The order in which an epoch of a stream visits its rows, and how well that mixes the classes.


FEW = 0.7  # of the classes that a shuffled window would hold; below that, batches differ too much in theirs


def stream_order(shards: Int[np.ndarray, "n"], window: int, seed: int, epoch: int) -> Int[np.ndarray, "n"]:
    """The order in which an epoch visits n rows that lie in these `shards`: shards shuffled, then windows of rows.

    With a window of n or more it is kd.views.order, that of data in memory.
    """
    count = int(shards.max()) + 1
    place = np.empty(count, np.int64)
    place[rng.order(seed, epoch, count).numpy()] = np.arange(count)
    sequence = np.argsort(place[shards], kind="stable")
    bits = rng.random_bits(torch.from_numpy(sequence), seed, "order", epoch).numpy()
    return sequence[np.lexsort((sequence, bits, np.arange(len(shards)) // window))]


def sorted_stream_advice(labels: Int[np.ndarray, "n"], window: int) -> str:
    """What to do about windows that hold few of the classes, in words; nothing where they hold about as many as rows
    drawn at random would. `labels` are in the order of an epoch."""
    shares = np.bincount(labels) / len(labels)
    windows = [labels[start : start + window] for start in range(0, len(labels) - window + 1, window)]
    if not windows:
        return ""
    found, by_chance = np.mean([len(np.unique(part)) for part in windows]), (1 - (1 - shares) ** window).sum()
    if found >= FEW * by_chance:
        return ""
    return (
        f"{window} rows in turn hold {found:.3g} classes, shuffled ones would hold {by_chance:.3g}: the data is sorted"
        " by class; give a larger --shuffle-rows, or store it shuffled"
    )


#: (kd.images.stream_source) Opening a stream: its labels are read first, without the images where the format allows that.


SHARDS = 1024  # the most that are told apart; an imagefolder has one for each image


SAMPLE = 16_384  # rows that mean and deviation are taken from; all, of a smaller set


BLOCK = 256  # rows of the sample at a time


class Streaming(DataSource):
    """A `datasets` set opened with streaming=True: `load(**how)` gives it."""

    def __init__(self, config: DataConfig, key: str, content: str, load: Callable):
        self.key, self.how = key, f"streamed, {config.shuffle_rows} rows at a time (as --stream says)"
        streams = {NAMES.get(name, name): stream for name, stream in load(streaming=True).items()}
        require("train" in streams, f"--data {config.source}: no train split; it has {', '.join(streams)}")
        with locked(f"{key}.stream") as self.folder:
            self.folder.mkdir(exist_ok=True)
            found = _index(self.folder, streams, config, load)
        self.classes, column = tuple(found["classes"]), found["image"]
        size = config.stored_size or config.image_size
        threads = max(share_of_cores() if config.workers is None else config.workers, 1)
        self.splits = {}
        for name, starts in found["starts"].items():
            cells = open_undecoded(streams[name], column).select_columns([column])
            first = next(iter(cells))[column] if size is None else None
            sides = (size, size) if size else decode(first, None, name, 0).shape[1:]
            labels = np.load(self.folder / f"{name}.npy")
            how = (column, name, size, sides, config.shuffle_rows, threads, np.array(starts), np.arange(len(labels)))
            self.splits[name] = Arrays(Streamed(cells, *how), labels)
        self.fingerprint = hashlib.sha256(json.dumps([content, found["starts"], self.classes]).encode()).hexdigest()

    def facts(self, train: Arrays) -> Facts:
        """Mean and deviation of the first rows of an epoch's order, or of all where they are few."""
        images = train.images
        if words := sorted_stream_advice(train.labels[images.order(0, 0)], images.window):
            print_once(f"data: {words}")
        chosen = images.order(0, 0)[:SAMPLE] if len(images.rows) > SAMPLE else np.arange(len(images.rows))
        path = self.folder / f"{hashlib.sha256(images.rows[chosen].tobytes()).hexdigest()[:16]}.json"
        with locked(f"{self.key}.stream"):
            if not path.exists():
                blocks = torch.from_numpy(chosen).split(BLOCK)
                seen = zip(_bar(blocks, "looking at train"), images.batches(blocks))
                mean, std = channel_statistics(block.numpy() for _, block in seen)
                write_json(path, {"mean": mean, "std": std})
            found = read_json(path)
        return Facts(tuple(found["mean"]), tuple(found["std"]), self.fingerprint)

    def rows(self, split: Arrays) -> Rows:
        return StreamedRows(split.images, torch.from_numpy(split.labels), self.fingerprint)


def _index(folder: Path, streams: dict, config: DataConfig, load: Callable) -> dict:
    """Class names, the image column, and where each split's shards start; the labels go into `folder`. Made once."""
    path = folder / "index.json"
    if path.exists():
        return read_json(path)
    features = streams["train"].features
    require(features is not None, f"--data {config.source}: a stream without named columns; leave --stream out")
    read = {}

    def values(split: str, label: str) -> tuple[list, list[int]]:
        if split not in read:
            read[split] = _read_labels(_labels_alone(streams, label, load)[split], label, split)
        return read[split]

    columns = find_columns(features, lambda label: list(set(values("train", label)[0])), config.label, config.source)
    starts = {}
    for name in ("train", "validation", "test"):
        if name in streams:
            check_columns(columns, streams[name].features, name, config.source)
            labels, starts[name] = values(name, columns.label)
            require(len(labels) > 0, f"the {name} split is empty")
            np.save(folder / f"{name}.npy", numbers_of(labels, columns.classes, name))
    write_json(path, {"classes": columns.classes, "image": columns.image, "starts": starts})
    return read_json(path)


def _labels_alone(streams: dict, label: str, load: Callable) -> dict:
    try:  # parquet reads the bytes of this column only
        alone = load(streaming=True, columns=[label])
    except UserError:  # other formats have no such setting
        alone = {name: stream.select_columns([label]) for name, stream in streams.items()}
    return {NAMES.get(name, name): stream for name, stream in alone.items()}


def _read_labels(stream, label: str, split: str) -> tuple[list, list[int]]:
    """All labels of a split, and the first row of each shard (and behind the last one)."""
    values, starts = [], [0]
    shards = min(stream.num_shards, SHARDS)
    for shard in _bar(range(shards), f"labels of {split}"):
        with breaking_off(f"the labels of {split}, row {len(values)}"):
            for table in stream.shard(num_shards=shards, index=shard).with_format("arrow").iter(10_000):
                values += table[label].to_pylist()
        starts.append(len(values))
    return values, starts


def _bar(parts, title: str):
    return track(parts, title, console=console, disable=not console.is_terminal, transient=True)
