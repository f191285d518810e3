"""Any image classification set as three splits of uint8 images.

How they are held is kd/images/holding.py's to choose. The validation split is held out of the training split, by class;
the test split is the data's own and is read once, at the end of a run.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd.config import DataConfig
from kd.errors import UserError, nearest, require
from kd.images.builtin_data import BUILT_IN
from kd.images.decode import Arrays, cached
from kd.images.holding import Kept, Source, hold, say
from kd.images.hub_sets import HUB_SETS, HubSet, advice, filled, find
from kd.images.listing import opened, state_of
from kd.images.pictures import VERSION
from kd.images.rows import Rows, Split
from kd.images.splits import hold_out, keep, long_tail
from kd.images.stream_source import Streaming

__all__ = ["Data", "Split", "load_data"]


@dataclass(frozen=True)
class Data:
    train: Rows
    val: Rows | None
    test: Rows
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of the training split, per channel, as shares of 255
    std: tuple[float, ...]
    fingerprint: str  # sha256 of all rows and class names in order; of a stream, of its files' names, sizes and times
    size: tuple[int, int]  # height and width of every image as networks see it
    held: str = "in memory"  # in words: how, and why so


def load_data(config: DataConfig) -> Data:
    """The three splits of `config.source`.

    Raises: UserError for a source that does not exist or cannot be reached, a broken row, a label out of range.
    """
    config = filled(config)
    config.check_sizes()
    source = _find(config)
    splits, classes = source.splits, source.classes
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
    # After the hold-out: validation keeps the frequencies that the test has, and is the same for every --imbalance.
    train = long_tail(train, config.imbalance, len(classes), config.split_seed)
    for name, split in (("train", train), ("validation", val), ("test", test)):
        require(split is None or len(split.labels) > 0, f"--data {config.source}: the {name} split is empty")
    _tell(config, source.how, {"training": train, "validation": val, "test": test}, classes)
    facts = source.facts(train)
    train, val, test = (split and source.rows(split) for split in (train, val, test))
    size = (config.image_size,) * 2 if config.image_size else train.size
    return Data(train, val, test, classes, *facts, size, source.how)


def _tell(config: DataConfig, how: str, splits: dict[str, Arrays | None], classes: tuple[str, ...]) -> None:
    """How the data is held and how much of it there is; and of which classes nothing can be learned."""
    sizes = ", ".join(f"{len(split.labels)} {name}" for name, split in splits.items() if split is not None)
    if config.source not in BUILT_IN:
        say(f"data: {how}; {sizes} images of {len(classes)} classes")
    missing = np.setdiff1d(splits["test"].labels, splits["training"].labels)
    if len(missing):
        names = ", ".join(classes[label] for label in missing[:3].tolist())
        say(f"data: classes of the test split without a training image: {len(missing)} ({names})")


def _find(config: DataConfig) -> Source:
    """The data, held as it can be."""
    source = config.source
    path = _local(source)
    if path.is_dir() and source in (*BUILT_IN, *HUB_SETS):
        built_in = f"the built-in set {source}, not the folder, which ./{source} names"
        say(f"data: {built_in if source in BUILT_IN else f'the folder {source}, not the set of that name'}")
    if source in BUILT_IN:
        for flag in ("label", "image_size", "stored_size"):
            given = getattr(config, flag)
            require(given is None, f"--{flag.replace('_', '-')} {given}: leave it out for the built-in set {source}")
        held = config.decode != "workers" and not config.stream
        require(held, f"--data {source}: the built-in set is in memory; leave --decode workers and --stream out")
        return Kept(*cached(f"{source}-v1", BUILT_IN[source]))
    if path.is_dir():
        state, layout = state_of(path)
        require(state is not None, f"--data {source}: the folder is empty")
        if left_out := layout.check(source):
            say(f"data: {left_out}")
        key, content = _key(str(path.resolve()), state, config), _key(state, config)
        return _held(config, key, content, lambda **how: _open_folder(path, **how))
    looks_like_id = source in HUB_SETS or ("/" in source and not source.startswith((".", "/", "~")))
    require(
        looks_like_id,
        f"--data {source}: no such folder, named set or Hub id (user/name); {nearest(source, [*BUILT_IN, *HUB_SETS])}",
    )
    known = find(source)
    revision = known.revision if _is_commit(known.revision) else _newest_revision(known.address, known.revision)
    place = known.address if known.folder is None else f"{known.address}/{known.folder}"
    key = _key(place, revision, config)
    return _held(config, key, key, lambda **how: _open_hub(known, revision, source, **how))


def _local(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise UserError(f"--data {source}: no such folder ({error})") from error


def _held(config: DataConfig, key: str, content: str, load: Callable) -> Source:
    """`key` says where it lies too, `content` only what it holds, as far as that is known without reading it."""
    if not config.stream:
        return hold(config, key, lambda: opened(key, load))
    return Streaming(config, key, content, load)


def _key(*parts) -> str:
    *identity, config = parts
    text = json.dumps([*identity, config.label, config.stored_size or config.image_size, VERSION])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _open_folder(path: Path, **how):
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it misses a card's metadata in a plain folder
    try:
        return datasets.load_dataset(str(path), **how)
    except (ValueError, FileNotFoundError, OSError, DatasetGenerationError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"--data {path}: no image data that can be read ({error}); wanted are folders of images named after their"
            " classes in train/ and test/, or parquet files"
        ) from error


def _open_hub(known: HubSet, revision: str | None, source: str, **how):
    import datasets

    folder = {"data_dir": known.folder} if known.folder else {}
    try:
        splits = datasets.load_dataset(known.address, revision=revision or known.revision, **folder, **how)
    except Exception as error:  # the HTTP client's own errors differ between versions of the library
        raise UserError(
            f"--data {source}: {known.address} could not be loaded from the Hub ({type(error).__name__}:"
            f" {str(error)[:150]}); {advice(known)}check the name and the network, name a local folder with --data, set"
            " HF_HUB_OFFLINE=1 if it was fetched before, or try --preset digits, which needs no download"
        ) from error
    return {name: rows for name, rows in splits.items() if name != known.unlabelled}


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _newest_revision(name: str, branch: str | None) -> str | None:
    """The commit that the Hub has now; None where it cannot be asked, and what is cached offline must do."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=branch, timeout=10).sha
    except Exception:  # as above: a slow answer is as good as none
        return None
