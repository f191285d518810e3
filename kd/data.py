"""Any image classification set as three splits of uint8 tensors.

Decoded once and kept as memory maps (kd/decode.py). The validation split is held out of the training split, by class;
the test split is the data's own and is read once, at the end of a run.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from kd.builtin_data import BUILT_IN
from kd.config import DataConfig
from kd.decode import Arrays, cached, decode_split, find_columns
from kd.errors import UserError, nearest, require
from kd.splits import hold_out, keep

# Built-in names of Hub data: id and the revision whose content we know.
HUB = {"cifar100": ("uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5")}


class Split(NamedTuple):
    images: UInt8[Tensor, "n 3 h w"]
    labels: Int[Tensor, "n"]

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    train: Split
    val: Split | None
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of the training split, per channel, as shares of 255
    std: tuple[float, ...]
    fingerprint: str  # sha256 of all rows and class names in order

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image."""
        return tuple(self.train.images.shape[2:])


def load_data(config: DataConfig) -> Data:
    """The three splits of `config.source`.

    Raises: UserError for a source that does not exist or cannot be reached, a broken row, a label out of range.
    """
    splits, classes, fingerprint = _arrays(config)
    if config.classes is not None:
        require(config.classes <= len(classes), f"--classes {config.classes}: {config.source} has {len(classes)}")
        classes = classes[: config.classes]
        splits = {name: keep(split, split.labels < config.classes) for name, split in splits.items()}
    train, val, test = splits["train"], splits.get("validation"), splits.get("test")
    if test is None:  # a set with train and validation only: its validation is what others report on
        val, test = None, val
    require(test is not None, f"--data {config.source}: only a train split; a test (or validation) split is needed")
    if val is None:
        train, val = hold_out(train, config.val_fraction, config.split_seed)
    for name, split in (("train", train), ("validation", val), ("test", test)):
        require(split is None or len(split.labels) > 0, f"--data {config.source}: the {name} split is empty")
    mean, std = channel_statistics(train.images)
    as_split = lambda arrays: arrays and Split(torch.from_numpy(arrays.images), torch.from_numpy(arrays.labels))  # noqa: E731
    return Data(as_split(train), as_split(val), as_split(test), classes, mean, std, fingerprint)


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel as shares of 255, from exact integer counts."""
    levels = np.arange(256)
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = sum(np.bincount(block[:, channel].ravel(), minlength=256) for block in _blocks(images))
        mean = (counts * levels).sum() / counts.sum()
        deviation = ((counts * (levels - mean) ** 2).sum() / counts.sum()) ** 0.5
        means.append(float(mean / 255))
        deviations.append(float(max(deviation, 1) / 255))  # a channel that never changes stays finite
    return tuple(means), tuple(deviations)


def _blocks(images: np.ndarray):
    return (images[start : start + 4096] for start in range(0, len(images), 4096))


def _arrays(config: DataConfig) -> tuple[dict[str, Arrays], tuple[str, ...], str]:
    source = config.source
    if source in BUILT_IN:
        for flag in ("label", "image_size"):
            given = getattr(config, flag)
            require(given is None, f"--{flag.replace('_', '-')} {given}: leave it out for the built-in set {source}")
        return cached(f"{source}-v1", BUILT_IN[source])
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        require(bool(files), f"--data {source}: the folder is empty")
        state = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = _key(str(path.resolve()), state, config)
        return cached(key, lambda folder: _decode(_open_folder(path), config, folder))
    looks_like_id = source in HUB or ("/" in source and not source.startswith((".", "/", "~")))
    require(
        looks_like_id,
        f"--data {source}: no such folder, built-in set or Hub id (user/name); {nearest(source, [*BUILT_IN, *HUB])}",
    )
    name, revision = HUB.get(source) or (*source.split("@", 1), None)[:2]
    revision = revision or _newest_revision(name)
    key = _key(name, revision, config)
    return cached(key, lambda folder: _decode(_open_hub(name, revision, source), config, folder))


def _key(*parts) -> str:
    *identity, config = parts
    text = json.dumps([*identity, config.label, config.image_size])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _open_folder(path: Path):
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it misses a card's metadata in a plain folder
    try:
        return datasets.load_dataset(str(path))
    except (ValueError, FileNotFoundError, OSError, DatasetGenerationError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"--data {path}: no image data that can be read ({error}); wanted are folders of images named after their"
            " classes in train/ and test/, or parquet files"
        ) from error


def _open_hub(name: str, revision: str | None, source: str):
    import datasets

    try:
        return datasets.load_dataset(name, revision=revision)
    except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"--data {source}: {name} could not be loaded from the Hub ({type(error).__name__}: {str(error)[:150]});"
            " check the name and the network, name a local folder with --data, set HF_HUB_OFFLINE=1 if it was fetched"
            " before, or try --preset digits, which needs no download"
        ) from error


def _newest_revision(name: str) -> str | None:
    """The commit that the Hub has now; None where it cannot be asked, and what is cached offline must do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return None
    except Exception as error:  # the HTTP client's own errors differ between versions of the library
        if "connect" not in f"{type(error).__name__} {error}".lower():
            raise
        return None


def _decode(dataset, config: DataConfig, folder: Path) -> tuple[str, ...]:
    names = {"val": "validation", "valid": "validation"}
    splits = {names.get(name, name): rows for name, rows in dataset.items()}
    require("train" in splits, f"--data {config.source}: no train split; it has {', '.join(splits)}")
    columns = find_columns(splits["train"], config.label, config.source)
    shape = None
    for name in ("train", "validation", "test"):
        if name in splits:
            missing = {columns.image, columns.label} - set(splits[name].column_names)
            require(not missing, f"--data {config.source}: its {name} split has no column {', '.join(missing)}")
            shape = decode_split(splits[name], columns, config.image_size, folder, name, shape)
    return columns.classes
