"""From whatever `datasets` can read to uint8 arrays on disk, once."""

import hashlib
import io
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from kd.errors import UserError, require
from kd.lock import Lock


class Arrays(NamedTuple):
    """One split: images uint8 N x 3 x H x W, labels int64 N."""

    images: np.ndarray
    labels: np.ndarray


class Columns(NamedTuple):
    image: str
    label: str
    classes: tuple[str, ...]


def cache_root() -> Path:
    """KD_CACHE, else kd/ in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kd"
    return Path(os.environ.get("KD_CACHE", default))


def cached(key: str, produce) -> tuple[dict[str, Arrays], tuple[str, ...], str]:
    """The splits kept under `key` (decoded by `produce(folder)` if they are not there), class names, and the sha256.

    One process decodes, others wait for it. What is on disk is believed only if its sha256 is right.
    """
    folder = cache_root() / "data" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder.with_suffix(".lock"))
        lock.acquire(wait=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent} ({error}); set KD_CACHE to a folder that can") from error
    try:
        found = _load(folder)
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
            partial = folder.with_name(f"{key}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                classes = produce(partial)
                _seal(partial, classes)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            found = _load(folder)
            require(found is not None, f"{folder} cannot be read back; is the disk sound?")
        return found
    finally:
        lock.close()


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
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (splits, classes, meta["sha256"]) if sound else None


def _open(folder: Path, name: str) -> Arrays:
    # Copy-on-write: torch warns about arrays that it could not write to, and nothing ever writes.
    return Arrays(np.load(folder / f"{name}.images.npy", mmap_mode="c"), np.load(folder / f"{name}.labels.npy"))


def _sha256(splits: dict[str, Arrays], classes: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps([sorted(splits), list(classes)]).encode())
    for name in sorted(splits):
        digest.update(str(splits[name].images.shape).encode())
        digest.update(splits[name].images)
        digest.update(splits[name].labels)
    return digest.hexdigest()


def write_arrays(folder: Path, splits: dict[str, Arrays]) -> None:
    """Keep arrays that exist already (the built-in sets)."""
    for name, arrays in splits.items():
        np.save(folder / f"{name}.images.npy", arrays.images)
        np.save(folder / f"{name}.labels.npy", arrays.labels)


def find_columns(dataset, label: str | None, source: str) -> Columns:
    """Image and label column and the class names, from the features of a `datasets.Dataset`."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    there = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in dataset.features.items())
    images = [name for name, kind in dataset.features.items() if isinstance(kind, ImageFeature)]
    require(bool(images), f"--data {source}: no image column; it has {there or 'no columns'}")
    named = [name for name, kind in dataset.features.items() if isinstance(kind, ClassLabel)]
    plain = [name for name in ("label", "labels", "fine_label", "target", "class") if name in dataset.features]
    require(label is None or label in dataset.features, f"--label {label}: no such column in {source}; it has {there}")
    chosen = label or next(iter(named + plain), None)
    require(chosen is not None, f"--data {source}: no label column; it has {there}; name one with --label")
    if isinstance(dataset.features[chosen], ClassLabel):
        return Columns(images[0], chosen, tuple(dataset.features[chosen].names))
    values = dataset.unique(chosen)
    require(
        all(isinstance(value, int | str) for value in values) and len({type(value) for value in values}) == 1,
        f"--label {chosen}: needs whole numbers or names, one for each row of {source}",
    )
    if isinstance(values[0], int):
        require(min(values) >= 0, f"--label {chosen}: {source} has the label {min(values)}; labels start at 0")
        return Columns(images[0], chosen, tuple(str(number) for number in range(max(values) + 1)))
    return Columns(images[0], chosen, tuple(sorted(values)))


def decode_split(dataset, columns: Columns, size: int | None, folder: Path, split: str, shape=None):
    """Decode every row into memory maps in `folder`; returns the images' (height, width).

    Raises UserError naming the split and row of an image that cannot be read or a label out of range.
    """
    from datasets import Image as ImageFeature

    require(len(dataset) > 0, f"the {split} split is empty")
    stored = dataset.cast_column(columns.image, ImageFeature(decode=False))
    first = _decode(stored[0][columns.image], size, split, 0)
    shape = shape or first.shape[1:]
    maps = np.lib.format.open_memmap(folder / f"{split}.images.npy", "w+", np.uint8, (len(dataset), 3, *shape))
    labels = np.empty(len(dataset), np.int64)
    lookup = {name: number for number, name in enumerate(columns.classes)}

    def one(row: int, cell: dict | None, label) -> None:
        image = _decode(cell, size, split, row)
        require(
            image.shape[1:] == tuple(shape),
            f"{split} row {row} is {image.shape[2]} x {image.shape[1]}, others {shape[1]} x {shape[0]}:"
            " give --image-size N to bring all to one size",
        )
        number = lookup.get(label) if isinstance(label, str) else label
        require(
            isinstance(number, int) and 0 <= number < len(columns.classes),
            f"{split} row {row}: label {label!r} is none of the {len(columns.classes)} classes; mend or drop the row",
        )
        maps[row], labels[row] = image, number

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4) as pool:
        blocks = range(0, len(dataset), 1000)
        for start in track(blocks, f"decoding {split}", disable=not sys.stderr.isatty(), transient=True):
            block = stored[start : start + 1000]
            rows = range(start, start + len(block[columns.image]))
            list(pool.map(one, rows, block[columns.image], block[columns.label]))
    maps.flush()
    np.save(folder / f"{split}.labels.npy", labels)
    return tuple(shape)


def _decode(cell: dict | None, size: int | None, split: str, row: int) -> np.ndarray:
    """One stored image to uint8 3 x H x W in RGB, resized and cropped to size x size if asked."""
    try:
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
        image = Image.open(source).convert("RGB")
    except Exception as error:  # Pillow raises many kinds; whatever it is, the row is at fault
        where = (cell or {}).get("path") or "no file name"
        raise UserError(f"{split} row {row} ({where}) is no readable image: mend or drop it ({error})") from error
    if size is not None:
        scale = size / min(image.size)
        wide, high = (max(size, round(side * scale)) for side in image.size)
        left, top = (wide - size) // 2, (high - size) // 2
        image = image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)
