"""From whatever `datasets` can read to uint8 arrays on disk, once."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from kd.arrays import create_map, read_array, write_array
from kd.errors import UserError, require
from kd.images.columns import Columns, numbers_of
from kd.images.pictures import decode, decode_to, pool
from kd.images.survey import Digest
from kd.lock import Lock


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
    digest = Digest(splits, classes)
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
    stored = undecoded(dataset, columns.image)
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


def undecoded(dataset, column: str):
    """The rows of a `datasets` set with their images as {"bytes", "path"}."""
    from datasets import Image as ImageFeature

    return dataset.cast_column(column, ImageFeature(decode=False))
