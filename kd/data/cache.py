"""Decode data sets to uint8 arrays on disk once, and open sets of many files quickly.

`datasets` takes minutes to list a hundred thousand files, and kilobytes of memory for each, at every start. So a
process of its own lists them once; from then on the tables that it wrote are mapped into memory.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from rich.progress import track

from kd.data.columns import Columns, read_labels
from kd.data.metadata import Loaded
from kd.data.statistics import ChannelHistogram, DatasetHash
from kd.errors import UserError, require
from kd.utils.files import create_map, read_array, read_json, write_array, write_json
from kd.utils.images import BrokenImage, decode_to, pool
from kd.utils.system import Lock, expand_user

BLOCK = 1000  # rows that are decoded at a time


class Arrays(NamedTuple):
    """One split: images (uint8 N x 3 x H x W, or LazyImages of that shape) and labels (int64 N)."""

    images: np.ndarray
    labels: np.ndarray


class Facts(NamedTuple):
    """What is known of a data set without its images."""

    classes: tuple[str, ...]
    columns: str = ""  # in words: where images and labels come from
    notes: tuple[str, ...] = ()  # what was left out or decided


class Decoded(NamedTuple):
    """A data set as it is cached."""

    splits: dict[str, Arrays]
    facts: Facts
    sha256: str
    folder: Path | None = None  # where it is cached, if it is


_trusted = ContextVar("trusted", default=False)


@contextmanager
def trusting(trusted: bool) -> Iterator[None]:
    """Inside, if `trusted`, caches are not hashed: another process of this run has just done so on this machine."""
    token = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(token)


def cache_root() -> Path:
    """KD_CACHE, else kd/ in the user's cache folder. Raises UserError for ~ of a user who does not exist."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kd"
    return expand_user(os.environ.get("KD_CACHE") or default, "KD_CACHE")


@contextmanager
def locked(key: str) -> Iterator[Path]:
    """The cache folder of `key`, locked: one process at a time works there, others wait."""
    folder = cache_root() / "data" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder.with_name(f"{folder.name}.lock"))  # not with_suffix, which would cut a key with a dot
        lock.acquire(wait=True)
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot be written to ({error}); set KD_CACHE to another folder") from error
    try:
        yield folder
    finally:
        lock.close()


def cached(key: str, create: Callable[[Path], Facts | None]) -> Decoded | None:
    """Load the splits that are cached under `key`, or create them.

    `create(folder)` writes the splits there and returns their facts, or None to cache nothing; then this returns None
    too. A cache whose content does not match its sha256 is created anew.
    """
    with locked(key) as folder:
        if (loaded := _load(folder)) is not None:
            return loaded
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(f"{key}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            facts = create(partial)
            if facts is None:
                return None
            _write_meta(partial, facts)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        loaded = _load(folder)
        require(loaded is not None, f"{folder}: differs from what was just written; check the disk")
        return loaded


def _write_meta(folder: Path, facts: Facts) -> None:
    splits = sorted({path.name.split(".")[0] for path in folder.glob("*.npy")})
    meta = {"splits": splits, **facts._asdict()}
    meta["sha256"] = hash_arrays({name: _open(folder, name) for name in splits}, facts.classes)
    (folder / "meta.json").write_text(json.dumps(meta))


def _load(folder: Path) -> Decoded | None:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {name: _open(folder, name) for name in meta["splits"]}
        facts = Facts(tuple(meta["classes"]), meta.get("columns", ""), tuple(meta.get("notes", ())))
        sha256 = meta["sha256"]
        intact = _trusted.get() or hash_arrays(splits, facts.classes) == sha256
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Decoded(splits, facts, sha256, folder) if intact else None


def _open(folder: Path, name: str) -> Arrays:
    # Copy-on-write, because torch warns about read-only arrays; nothing ever writes.
    return Arrays(read_array(folder / f"{name}.images.npy", "c"), read_array(folder / f"{name}.labels.npy"))


def hash_arrays(splits: dict[str, Arrays], classes: tuple[str, ...]) -> str:
    digest = DatasetHash(splits, classes)
    for name in sorted(splits):
        digest.begin(splits[name].images.shape)
        digest.update(splits[name].images)
        digest.update(splits[name].labels)
    return digest.hexdigest()


def kept_levels(
    folder: Path, rows: Int[np.ndarray, "n"], pixels: int, count: Callable[[], ChannelHistogram]
) -> ChannelHistogram:
    """The levels of these training rows, of `pixels` pixels each: kept beside the decoded images, else by `count()`."""
    path = folder / f"levels-{hashlib.sha256(np.ascontiguousarray(rows)).hexdigest()[:16]}.json"
    with suppress(UserError, ValueError, KeyError, TypeError):  # there is none, or it is damaged
        return ChannelHistogram.of(read_json(path)["counts"], len(rows) * pixels)
    histogram = count()
    with suppress(OSError):  # a cache that may only be read: it is counted again next time
        write_json(path, {"counts": histogram.counts.tolist()})
    return histogram


def write_arrays(folder: Path, splits: dict[str, Arrays]) -> None:
    """Write splits that are arrays already, those of the built-in sets."""
    for name, arrays in splits.items():
        write_array(folder / f"{name}.images.npy", arrays.images)
        write_array(folder / f"{name}.labels.npy", arrays.labels)


def decode_split(
    dataset, columns: Columns, size: int | None, folder: Path, split: str, image_size: tuple[int, int]
) -> list[str]:
    """Decode every row of a `datasets` split into memory maps in `folder`; all have `image_size` (height, width).

    Leaves out images that cannot be read and returns what is wrong with each. Raises UserError naming the split and row
    of an image of another size, or of a label that is no class.
    """
    labels = read_labels(dataset, columns, split)
    stored, path = open_undecoded(dataset, columns.image), folder / f"{split}.images.npy"
    images = create_map(path, np.uint8, (len(dataset), 3, *image_size))
    broken: dict[int, str] = {}

    def decode_row(row: int, cell: dict | None) -> None:
        try:
            images[row] = decode_to(image_size, cell, size, split, row)
        except BrokenImage as error:
            broken[row] = error.what

    with pool() as threads:
        starts = range(0, len(dataset), BLOCK)
        for start in track(starts, f"decoding {split}", disable=not sys.stderr.isatty(), transient=True):
            cells = stored[start : start + BLOCK][columns.image]
            list(threads.map(decode_row, range(start, start + len(cells)), cells))
    images.flush()
    if broken:
        whole = np.setdiff1d(np.arange(len(labels)), list(broken))
        _keep_rows(path, images, whole)
        labels = labels[whole]
    write_array(folder / f"{split}.labels.npy", labels)
    return [broken[row] for row in sorted(broken)]


def _keep_rows(path: Path, images: np.ndarray, rows: np.ndarray) -> None:
    """Write the memory map anew with these rows alone."""
    kept = path.with_name(f"{path.name}.kept")
    target = create_map(kept, np.uint8, (len(rows), *images.shape[1:]))
    for start in range(0, len(rows), BLOCK):
        target[start : start + BLOCK] = images[rows[start : start + BLOCK]]
    target.flush()
    kept.rename(path)


def open_undecoded(dataset, column: str):
    """A `datasets` split whose images are {"bytes", "path"} instead of pixels."""
    from datasets import Image as ImageFeature

    return dataset.cast_column(column, ImageFeature(decode=False))


def open_dataset(key: str, load: Callable[[], Loaded]) -> Loaded:
    """The `datasets` splits that `load()` gives, mapped from the tables on disk of an earlier call if there are any.

    Raises UserError as `load` does.
    """
    with locked(f"{key}.tables") as folder:
        folder.mkdir(exist_ok=True)
        path = folder / "tables.json"
        known = read_json(path) if path.exists() else {}
        tables = known.get("tables", {})
        if not (tables and all(os.path.exists(file) for files in tables.values() for file in files)):
            tables, notes = _list_tables(load)
            known = {"tables": tables, "notes": notes}
            write_json(path, known)
    if not tables:
        return load()
    return Loaded({name: _map_tables(files) for name, files in tables.items()}, tuple(known["notes"]))


def _map_tables(files: list[str]):
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])


def _list_tables(load: Callable[[], Loaded]) -> tuple[dict[str, list[str]], list[str]]:
    """Run `load()` in a process of its own; the arrow files of each split ({} if some split has none), and notes."""
    context = multiprocessing.get_context("fork")  # `load` is a closure
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_tables, args=(load, sender))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:  # the process died; its cause will show when `load` runs in this process
        result = {}, []
    process.join()
    if isinstance(result, str):
        raise UserError(result)
    return result


def _send_tables(load: Callable[[], Loaded], sender: Connection) -> None:
    try:
        loaded = load()
        tables = {name: [file["filename"] for file in rows.cache_files] for name, rows in loaded.splits.items()}
    except UserError as error:
        sender.send(str(error))
    else:
        sender.send((tables if all(tables.values()) else {}, list(loaded.notes)))
