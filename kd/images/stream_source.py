"""Opening a stream: its labels are read first, without the images where the format allows that."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from kd.config import DataConfig
from kd.cores import share_of_cores
from kd.display import console
from kd.errors import UserError, require
from kd.files import read_json, write_json
from kd.images.columns import check_columns, find_columns, numbers_of
from kd.images.decode import Arrays, locked, undecoded
from kd.images.holding import NAMES, Source, say
from kd.images.pictures import decode
from kd.images.rows import Rows
from kd.images.stream import Streamed, StreamedRows, breaking_off
from kd.images.stream_order import few_classes
from kd.images.survey import Facts, channel_statistics

SHARDS = 1024  # the most that are told apart; an imagefolder has one for each image
SAMPLE = 16_384  # rows that mean and deviation are taken from; all, of a smaller set
BLOCK = 256  # rows of the sample at a time


class Streaming(Source):
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
            cells = undecoded(streams[name], column).select_columns([column])
            first = next(iter(cells))[column] if size is None else None
            sides = (size, size) if size else decode(first, None, name, 0).shape[1:]
            labels = np.load(self.folder / f"{name}.npy")
            how = (column, name, size, sides, config.shuffle_rows, threads, np.array(starts), np.arange(len(labels)))
            self.splits[name] = Arrays(Streamed(cells, *how), labels)
        self.fingerprint = hashlib.sha256(json.dumps([content, found["starts"], self.classes]).encode()).hexdigest()

    def facts(self, train: Arrays) -> Facts:
        """Mean and deviation of the first rows of an epoch's order, or of all where they are few."""
        images = train.images
        if words := few_classes(train.labels[images.order(0, 0)], images.window):
            say(f"data: {words}")
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
