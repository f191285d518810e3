"""From whatever `datasets` can read to uint8 arrays on disk, once."""

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from kd.data.columns import Columns, numbers_of
from kd.data.statistics import DatasetHash
from kd.errors import UserError, require
from kd.utils.files import create_map, read_array, read_json, write_array, write_json
from kd.utils.images import decode, decode_to, pool
from kd.utils.system import Lock


class Arrays(NamedTuple):
    """One split: images uint8 N x 3 x H x W, or what gives them when they are asked for; labels int64 N."""

    images: np.ndarray  # or a kd.images.rows.Selected, of which a mask selects in the same way
    labels: np.ndarray


def cache_root() -> Path:
    """KD_CACHE, else kd/ in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kd"
    return Path(os.environ.get("KD_CACHE", default))


@contextmanager
def locked(key: str) -> Iterator[Path]:
    """The folder of what is kept under `key`; one process at a time works there, others wait for it."""
    folder = cache_root() / "data" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder.with_name(f"{folder.name}.lock"))  # keys may hold dots: each has a lock of its own
        lock.acquire(wait=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent} ({error}); set KD_CACHE to a folder that can") from error
    try:
        yield folder
    finally:
        lock.close()


def cached(key: str, produce) -> tuple[dict[str, Arrays], tuple[str, ...], str] | None:
    """The splits kept under `key` (decoded by `produce(folder)` if they are not there), class names, and the sha256.

    None where they are not there and `produce` gives None: they are not to be kept. What is on disk is believed only
    if its sha256 is right.
    """
    with locked(key) as folder:
        if (found := _load(folder)) is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(f"{key}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            classes = produce(partial)
            if classes is None:
                return None
            _seal(partial, classes)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        found = _load(folder)
        require(found is not None, f"{folder} cannot be read back; is the disk sound?")
        return found


def _seal(folder: Path, classes: tuple[str, ...]) -> None:
    splits = sorted({path.name.split(".")[0] for path in folder.glob("*.npy")})
    meta = {"splits": splits, "classes": classes}
    meta["sha256"] = _sha256({name: _open(folder, name) for name in splits}, classes)
    (folder / "meta.json").write_text(json.dumps(meta))


def _load(folder: Path):
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {name: _open(folder, name) for name in meta["splits"]}
        classes = tuple(meta["classes"])
        sound = _sha256(splits, classes) == meta["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (splits, classes, meta["sha256"]) if sound else None


def _open(folder: Path, name: str) -> Arrays:
    # Copy-on-write: torch warns about arrays that it could not write to, and nothing ever writes.
    return Arrays(read_array(folder / f"{name}.images.npy", "c"), read_array(folder / f"{name}.labels.npy"))


def _sha256(splits: dict[str, Arrays], classes: tuple[str, ...]) -> str:
    digest = DatasetHash(splits, classes)
    for name in sorted(splits):
        digest.begin(splits[name].images.shape)
        digest.update(splits[name].images)
        digest.update(splits[name].labels)
    return digest.hexdigest()


def write_arrays(folder: Path, splits: dict[str, Arrays]) -> None:
    """Keep arrays that exist already (the built-in sets)."""
    for name, arrays in splits.items():
        write_array(folder / f"{name}.images.npy", arrays.images)
        write_array(folder / f"{name}.labels.npy", arrays.labels)


def decode_split(dataset, columns: Columns, size: int | None, folder: Path, split: str, shape=None):
    """Decode every row into memory maps in `folder`; returns the images' (height, width).

    Raises UserError naming the split and row of an image that cannot be read or a label out of range.
    """
    require(len(dataset) > 0, f"the {split} split is empty")
    labels = numbers_of(dataset[columns.label], columns.classes, split)
    stored = open_undecoded(dataset, columns.image)
    shape = shape or decode(stored[0][columns.image], size, split, 0).shape[1:]
    maps = create_map(folder / f"{split}.images.npy", np.uint8, (len(dataset), 3, *shape))

    def one(row: int, cell: dict | None) -> None:
        maps[row] = decode_to(tuple(shape), cell, size, split, row)

    with pool() as threads:
        blocks = range(0, len(dataset), 1000)
        for start in track(blocks, f"decoding {split}", disable=not sys.stderr.isatty(), transient=True):
            cells = stored[start : start + 1000][columns.image]
            list(threads.map(one, range(start, start + len(cells)), cells))
    maps.flush()
    write_array(folder / f"{split}.labels.npy", labels)
    return tuple(shape)


def open_undecoded(dataset, column: str):
    """The rows of a `datasets` set with their images as {"bytes", "path"}."""
    from datasets import Image as ImageFeature

    return dataset.cast_column(column, ImageFeature(decode=False))


def open_dataset(key: str, load: Callable) -> dict:
    """What `load()` gives (`datasets` sets by split), from its tables on the disk. Raises UserError as it does."""
    with locked(f"{key}.tables") as folder:
        folder.mkdir(exist_ok=True)
        path = folder / "tables.json"
        tables = read_json(path) if path.exists() else {}
        if not (tables and all(os.path.exists(file) for files in tables.values() for file in files)):
            tables = _listed(load)
            write_json(path, tables)
    return {name: _mapped(files) for name, files in tables.items()} if tables else load()


def _mapped(files: list[str]):
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])


def _listed(load: Callable) -> dict[str, list[str]]:
    """The arrow files of each split that `load()` writes; empty where some split has none."""
    context = multiprocessing.get_context("fork")  # `load` is a closure
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_list, args=(load, sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:  # it died without a word: whatever it was will show itself here
        answer = {}
    process.join()
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


def _list(load: Callable, answer: Connection) -> None:
    try:
        tables = {name: [file["filename"] for file in rows.cache_files] for name, rows in load().items()}
    except UserError as error:
        answer.send(str(error))
    else:
        answer.send(tables if all(tables.values()) else {})
