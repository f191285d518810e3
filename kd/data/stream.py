"""Data that is read in the order it is stored in, for sets that fit neither memory nor disk (--stream).

Rows keep their number in the unshuffled stream, so labels, hold-out, a teacher's cached logits and resuming work as for
other storage. Only the training order differs: an epoch shuffles the shards, then the rows within each window of
--shuffle-rows, as a pure function of seed and epoch. Every process reads the whole stream and decodes its own share.
Labels are read first, without the images if the format allows that.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from rich.progress import track
from torch import Tensor

from kd.config import DataConfig
from kd.data.cache import Arrays, locked, open_undecoded
from kd.data.columns import UNLABELLED, Columns, check_columns, encode_labels, find_columns, is_unlabelled
from kd.data.rows import LazyImages, Rows
from kd.data.statistics import Statistics, channel_statistics
from kd.data.storage import (
    SPLIT_NAMES,
    UNLABELLED_TEST,
    DataSource,
    handle_broken,
    rename_splits,
    unused_splits,
    used_splits,
    without_rows,
)
from kd.errors import UserError, require
from kd.utils import rng
from kd.utils.console import console, one_line, print_once
from kd.utils.files import read_array, read_json, write_array, write_atomically, write_json
from kd.utils.images import BrokenImage, broken_images, decode, decode_to
from kd.utils.system import share_of_cores

MAX_SHARDS = 1024  # that are told apart; an imagefolder is one, whatever its number of files

MAX_OPEN = 4  # shards that stay open for the next window, which goes on in those where the last one ended

SAMPLE_ROWS = 16_384  # rows that mean and deviation are computed from; all rows of a smaller set

BLOCK = 256  # rows of the sample at a time

WELL_MIXED = 0.7  # of the classes that a window of shuffled rows has; with fewer, batches differ too much


class Content(NamedTuple):
    """Two hashes of data, as far as it is known without reading it."""

    here: str  # changes if one of the files does
    alike: str  # that of a copy on another machine too, whose files have other times


class Streaming(DataSource):
    """A `datasets` set that `load` opens with streaming=True."""

    def __init__(self, config: DataConfig, key: str, content: Content, load: Callable):
        self.key = key
        loaded = load(streaming=True)
        streams = rename_splits(loaded.splits, config.source)
        with locked(f"{key}.stream") as self.folder:
            self.folder.mkdir(exist_ok=True)
            index, numbers = _index(self.folder, streams, config, load)
        self.classes, column = tuple(index["classes"]), index["image"]
        self.storage = f"streamed, {config.shuffle_rows} rows at a time (as --stream says), {index['columns']}"
        self.notes = (*loaded.notes, *unused_splits(streams, config), *index["notes"])
        size = config.stored_size or config.image_size
        threads = max(share_of_cores() if config.workers is None else config.workers, 1)
        image_size = (size, size) if size else _first_size(streams["train"], column)
        self.splits = {}
        for name, starts in index["starts"].items():
            cells, labels = open_undecoded(streams[name], column).select_columns([column]), numbers[name]
            images = StreamedImages(
                cells,
                column,
                name,
                resize_to=size,
                image_size=image_size,
                window=config.shuffle_rows,
                threads=threads,
                starts=np.array(starts),
                rows=np.arange(len(labels)),
            )
            self.splits[name] = Arrays(images, labels)
        if config.skip_broken:
            broken = {name: self._find_broken(split) for name, split in self.splits.items()}
            self.notes += handle_broken({name: list(found.values()) for name, found in broken.items()}, skip=True)
            self.splits = {name: without_rows(split, broken[name]) for name, split in self.splits.items()}
        self.skips_broken = config.skip_broken
        self.fingerprint, self.alike = (
            hashlib.sha256(json.dumps([part, index["starts"], self.classes]).encode()).hexdigest() for part in content
        )
        self.image = config.image or ""

    def check_images(self, splits: list[Arrays]) -> None:
        """Decode these splits once, as their broken images would else be found after the training only."""
        if not self.skips_broken:
            every = [what for split in splits for what in self._find_broken(split).values()]
            handle_broken({"": every}, skip=False)

    def _find_broken(self, split: Arrays) -> dict[int, str]:
        """Place and message of each image of a split that cannot be read, cached."""
        images, rows = split.images, hashlib.sha256(split.images.rows.tobytes()).hexdigest()[:16]
        path = self.folder / f"{images.split}.{rows}.broken.json"
        with locked(f"{self.key}.stream"):
            if not path.exists():
                write_json(path, images.find_broken())
            return {int(place): message for place, message in read_json(path).items()}

    def statistics(self, train: Arrays) -> Statistics:
        """Mean and deviation of the first rows of an epoch's order, or of all rows if they are few."""
        images = train.images
        order = images.order(0, 0)
        if self.classes and (advice := sorted_stream_advice(train.labels[order], images.window)):
            print_once(f"data: {advice}")
        sample = order[:SAMPLE_ROWS] if len(images.rows) > SAMPLE_ROWS else np.arange(len(images.rows))
        path = self.folder / f"{hashlib.sha256(images.rows[sample].tobytes()).hexdigest()[:16]}.json"
        with locked(f"{self.key}.stream"):
            if not path.exists():
                blocks = torch.from_numpy(sample).split(BLOCK)
                pixels = zip(_progress(blocks, "scanning train"), images.batches(blocks))
                try:
                    mean, std = channel_statistics(block.numpy() for _, block in pixels)
                except BrokenImage:
                    every = images[np.isin(np.arange(len(images.rows)), sample)].find_broken().values()
                    raise broken_images(list(every)) from None
                write_json(path, {"mean": mean, "std": std})
            known = read_json(path)
        return Statistics(tuple(known["mean"]), tuple(known["std"]), self.fingerprint)

    def rows(self, split: Arrays) -> Rows:
        return StreamedRows(split.images, torch.from_numpy(split.labels), self.fingerprint, self.alike, self.image)


def _first_size(train, column: str) -> tuple[int, int]:
    """Height and width of the first image that can be read."""
    broken = []
    for row, cell in enumerate(open_undecoded(train, column).select_columns([column])):
        try:
            return decode(cell[column], None, "train", row).shape[1:]
        except BrokenImage as error:
            broken.append(error.what)
    raise broken_images(broken)


def _index(folder: Path, streams: dict, config: DataConfig, load: Callable) -> tuple[dict, dict[str, np.ndarray]]:
    """Class names, columns and the first row of each split's shards, and each split's labels; cached in `folder`."""
    with suppress(UserError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or it is damaged
        return _known_index(folder)
    features = streams["train"].features
    require(features is not None, f"--data {config.source}: a stream without named columns; leave --stream out")
    read = {}

    def labels_of(split: str, column: str) -> tuple[list, list[int]]:
        if split not in read:
            selected = _select_labels(streams, column, load)[split]
            read[split] = _read_labels(selected, column, split, counted=config.no_labels)
        return read[split]

    unique = lambda column: list(set(labels_of("train", column)[0]))  # noqa: E731
    columns = find_columns(features, unique, config)
    starts, sha256, read_column = {}, {}, columns.label or _cheapest(features, columns)
    notes = [columns.note] if columns.note else []
    for name in used_splits(config):
        if name in streams:
            lacks = columns.label and columns.label not in streams[name].features
            if name == "test" and columns.label and (lacks or is_unlabelled(labels_of(name, read_column)[0])):
                notes.append(UNLABELLED_TEST)
                continue
            check_columns(columns, streams[name].features, name, config.source)
            labels, starts[name] = labels_of(name, read_column)
            require(len(labels) > 0, f"--data {config.source}: the {name} split is empty")
            numbers = encode_labels(labels, columns, name) if columns.label else np.full(len(labels), UNLABELLED)
            write_atomically(folder / f"{name}.npy", partial(write_array, array=numbers))
            sha256[name] = hashlib.sha256(numbers).hexdigest()
    facts = {"classes": columns.classes, "image": columns.image, "columns": str(columns)}
    write_json(folder / "index.json", facts | {"notes": notes, "starts": starts, "sha256": sha256})
    return _known_index(folder)


def _known_index(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What _index wrote. Raises UserError, or any error of damaged JSON, if that is not what is there."""
    index = read_json(folder / "index.json")
    labels = {name: read_array(folder / f"{name}.npy") for name in index["starts"]}
    found = {name: hashlib.sha256(numbers).hexdigest() for name, numbers in labels.items()}
    require(index["sha256"] == found, f"{folder}: differs from what was written; check the disk")
    return index, labels


def _cheapest(features, columns: Columns) -> str:
    """The column by which rows are counted without labels: one of plain values if there is one, else the images."""
    from datasets import ClassLabel, Value

    plain = [name for name, kind in features.items() if isinstance(kind, ClassLabel | Value)]
    return plain[0] if plain else columns.image


def _select_labels(streams: dict, column: str, load: Callable) -> dict:
    try:  # parquet reads the bytes of this column only
        loaded = load(streaming=True, columns=[column])
        return {SPLIT_NAMES.get(name, name): stream for name, stream in loaded.splits.items()}
    except (UserError, TypeError):  # other formats have no such option
        return {name: stream.select_columns([column]) for name, stream in streams.items()}


def _read_labels(stream, column: str, split: str, counted: bool = False) -> tuple[list, list[int]]:
    """All labels of a split, and the first row of each shard, with the number of rows at the end.

    `counted`: the rows are only counted, by a column of any kind, and each has the label None.
    """
    labels, starts = [], [0]
    shards = min(stream.num_shards, MAX_SHARDS)
    what = "rows" if counted else "labels"
    for shard in _progress(range(shards), f"{what} of {split}"):
        with stream_errors(f"the {what} of {split}, row {len(labels)}"):
            for table in stream.shard(num_shards=shards, index=shard).with_format("arrow").iter(10_000):
                labels += [None] * len(table) if counted else table[column].to_pylist()
        starts.append(len(labels))
    return labels, starts


def _progress(parts: Sequence, title: str) -> Iterable:
    return track(parts, title, console=console, disable=not console.is_terminal, transient=True)


def stream_order(shards: Int[np.ndarray, "n"], window: int, seed: int, epoch: int) -> Int[np.ndarray, "n"]:
    """The order in which an epoch visits n rows that lie in these `shards`: shards shuffled, then windows of rows.

    With a window of n or more it is kd.utils.rng.order, that of data in memory.
    """
    count = int(shards.max()) + 1
    place = np.empty(count, np.int64)
    place[rng.order(seed, epoch, count).numpy()] = np.arange(count)
    sequence = np.argsort(place[shards], kind="stable")
    bits = rng.random_bits(torch.from_numpy(sequence), seed, "order", epoch).numpy()
    return sequence[np.lexsort((sequence, bits, np.arange(len(shards)) // window))]


def sorted_stream_advice(labels: Int[np.ndarray, "n"], window: int) -> str:
    """Advice if a window has far fewer classes than rows drawn at random; "" if it has about as many.

    `labels` are in the order of an epoch.
    """
    shares = np.bincount(labels) / len(labels)
    windows = [labels[start : start + window] for start in range(0, len(labels) - window + 1, window)]
    if not windows:
        return ""
    actual, expected = np.mean([len(np.unique(part)) for part in windows]), (1 - (1 - shares) ** window).sum()
    if actual >= WELL_MIXED * expected:
        return ""
    return (
        f"{window} consecutive rows have {actual:.3g} classes, shuffled ones would have {expected:.3g}: the data is"
        " sorted by class; give a larger --shuffle-rows, or store it shuffled"
    )


@dataclass(frozen=True)
class StreamedImages(LazyImages):
    """Images of a split, read from its shards."""

    stream: object  # a datasets.IterableDataset of undecoded images
    column: str
    split: str
    resize_to: int | None
    image_size: tuple[int, int]  # height and width of the decoded images
    window: int
    threads: int
    starts: Int[np.ndarray, "m"]  # the first row of each shard, then the number of rows
    rows: Int[np.ndarray, "n"]  # numbers of these images in the stream

    def order(self, seed: int, epoch: int) -> Int[np.ndarray, "n"]:
        return stream_order(self.shards_of(self.rows), self.window, seed, epoch)

    def shards_of(self, rows: Int[np.ndarray, "k"]) -> Int[np.ndarray, "k"]:
        return np.searchsorted(self.starts, rows, side="right") - 1

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images (uint8 b x 3 x h x w) of each index (b) in `indices`; fast in an order of `stream_order`.

        Buffers about a window of encoded images, reads another one ahead and decodes one batch ahead.
        """
        wanted = [self.rows[index.numpy()] for index in indices]
        reader, ahead = _Reader(self, wanted), self.window // max(map(len, wanted), default=1) + 1
        reading, decoding = ThreadPoolExecutor(1), ThreadPoolExecutor(self.threads)
        try:
            read = _prefetch((reading.submit(reader.cells, rows) for rows in wanted), ahead)
            for images in _prefetch((self._decode(decoding, *batch) for batch in zip(wanted, read)), 1):
                yield torch.from_numpy(np.stack([image.result() for image in images]))
        finally:
            for pool in (reading, decoding):
                pool.shutdown(cancel_futures=True)

    def find_broken(self) -> dict[int, str]:
        """Place and message of each image that cannot be read. Raises UserError for one of another size."""
        found: dict[int, str] = {}
        reader, pool = _Reader(self, [self.rows]), ThreadPoolExecutor(self.threads)
        blocks = np.array_split(np.arange(len(self.rows)), len(self.rows) // BLOCK + 1)
        with pool:
            for places in _progress(blocks, f"checking {self.split}"):
                rows = self.rows[places]
                for place, message in zip(places.tolist(), pool.map(self._check, rows.tolist(), reader.cells(rows))):
                    found |= {place: message} if message else {}
        return found

    def _check(self, row: int, cell: dict | None) -> str:
        try:
            decode_to(self.image_size, cell, self.resize_to, self.split, row)
        except BrokenImage as error:
            return error.what
        return ""

    def _decode(self, pool: ThreadPoolExecutor, rows: np.ndarray, cells: Future) -> list[Future]:
        return [
            pool.submit(decode_to, self.image_size, cell, self.resize_to, self.split, row)
            for row, cell in zip(rows.tolist(), cells.result())
        ]


@dataclass(frozen=True)
class StreamedRows(Rows):
    """A split that is streamed."""

    images: StreamedImages
    labels: Int[Tensor, "n"]
    fingerprint: str
    alike: str  # the fingerprint of any copy of the same files
    image: str  # the column of --image; empty if it was left out

    @property
    def size(self) -> tuple[int, int]:
        return self.images.image_size

    @property
    def sha256(self) -> str:
        """Hash of the stream's fingerprint and these rows' numbers: the content is never read at once."""
        source = f"{self.fingerprint}{self.image}".encode()
        return hashlib.sha256(source + self.images.rows.tobytes()).hexdigest()

    def order(self, seed: int, epoch: int) -> Int[Tensor, "n"]:
        return torch.from_numpy(self.images.order(seed, epoch))

    def sample(self, count: int) -> Int[Tensor, "k"]:
        """The first rows: others would read the stream up to them."""
        return torch.arange(count).clamp(max=len(self.labels) - 1)

    def batches(self, indices: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        for images in self.images.batches(indices):
            yield (images.pin_memory() if device.type == "cuda" else images).to(device, non_blocking=True)


def _prefetch(items: Iterator, count: int) -> Iterator:
    """The items, each after `count` more have been started."""
    started: deque = deque()
    for item in items:
        started.append(item)
        if len(started) > count:
            yield started.popleft()
    yield from started


class _Reader:
    """Reads rows by number, each shard once from front to back, and buffers what it passes that is wanted later.

    In an order of `stream_order` the buffer has at most two windows of rows and a batch.
    """

    def __init__(self, images: StreamedImages, wanted: list[np.ndarray]):
        self.images, self.buffer = images, {}
        self.rows = np.concatenate([*wanted, np.empty(0, np.int64)])
        self.shards, self.position = images.shards_of(self.rows), 0  # in `rows`, of the next one to be returned
        self.wanted = np.zeros(images.starts[-1], bool)
        for rows in wanted:
            self.wanted[rows] = True
        self.opened: dict[int, tuple[int, Iterator]] = {}  # shard -> its next row, and an iterator from there

    def cells(self, rows: np.ndarray) -> list[dict | None]:
        """The encoded images of these rows. Raises UserError if the stream breaks off."""
        for row, shard in zip(rows.tolist(), self.images.shards_of(rows).tolist()):
            with stream_errors(f"{self.images.split} row {row}"):
                if row not in self.buffer:
                    self._read_to(row, shard)
            self.position += 1
        cells = [self.buffer[row] for row in rows.tolist()]
        for row in rows.tolist():
            self.buffer.pop(row, None)
            self.wanted[row] = False
        return cells

    def _read_to(self, row: int, shard: int) -> None:
        """Read the shard up to `row`, and on to the last of its rows in the next window.

        A window may lie in any number of shards; they cannot all stay open until each has given its rows one by one.
        """
        images, upcoming = self.images, slice(self.position, self.position + self.images.window)
        last = int(self.rows[upcoming][self.shards[upcoming] == shard].max(initial=row))
        self.wanted[row] = True  # a row may occur twice in `rows`
        start, cells = self.opened.pop(shard, (row + 1, None))
        if start > row:
            first, end = images.starts[shard : shard + 2].tolist()
            start = first + int(self.wanted[first:end].argmax())
            stream = images.stream.shard(num_shards=len(images.starts) - 1, index=shard)
            cells = iter(stream.skip(start - first))
        for number, stored in zip(range(start, last + 1), cells, strict=False):
            if self.wanted[number]:
                self.buffer[number] = stored[images.column]
        if row not in self.buffer:
            raise EOFError("it has fewer rows than when its labels were read")
        if self.wanted[last + 1 : images.starts[shard + 1]].any():
            self.opened[shard] = (last + 1, cells)
        while len(self.opened) > MAX_OPEN:
            self.opened.pop(next(iter(self.opened)))


@contextmanager
def stream_errors(where: str) -> Iterator[None]:
    """Turn any error of the network or a file into a UserError that says where the stream broke off."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"the stream broke off at {where} ({one_line(error)}): check the network and the files, then continue with"
            " --resume"
        ) from error
