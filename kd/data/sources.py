"""Find the data that --data names: a built-in set, a folder, a named set or any set on the Hub.

The cache key of a folder changes with the files' names, sizes and times; that of a Hub set with its revision.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from kd.config import DataConfig
from kd.data.cache import Arrays, Facts, cache_root, cached, open_dataset, write_arrays
from kd.data.folder import ImageFolder, check_archives, check_names, describe_files, scan_folder
from kd.data.metadata import Loaded, read_folder
from kd.data.own import load_own
from kd.data.splits import hold_out
from kd.data.storage import DataSource, InMemory, WithoutLabels, choose_storage
from kd.data.stream import Content, Streaming
from kd.data.tables import TableFolder, compare_hub_files, load_folder
from kd.errors import UserError, nearest, require
from kd.utils.console import one_line, print_once, root_cause
from kd.utils.images import VERSION
from kd.utils.system import expand_user
from kd.utils.users_own import is_module_function

READER = 2  # version of how rows and labels are read from files; part of the key of every cache on disk


@dataclass(frozen=True)
class HubSet:
    """A set on the Hub whose columns are known; it has only one image column."""

    address: str
    label: str = "label"
    image_size: int | None = None  # default of --image-size, for images that differ in size
    revision: str | None = None  # a commit whose content we know, or a branch; else the newest commit
    folder: str | None = None  # of the repository, if it has several forms of the set
    unlabelled: str | None = None  # a split without labels, which is ignored
    gated: bool = False  # its owners' terms must be accepted first


# Splits are called train, validation (or valid) and test; without a test split the validation split is reported.
HUB_SETS = {
    "cifar10": HubSet("uoft-cs/cifar10"),
    "cifar100": HubSet("uoft-cs/cifar100", "fine_label", revision="aadb3af77e9048adbea6b47c21a81e47dd092ae5"),
    "tiny-imagenet": HubSet("zh-plus/tiny-imagenet", image_size=64),
    # Its own files are a script, which `datasets` no longer runs; this branch is the Hub's conversion of them.
    "imagenette": HubSet("frgfm/imagenette", image_size=160, revision="refs/convert/parquet", folder="160px"),
    "food101": HubSet("ethz/food101", image_size=224),
    "oxford-pets": HubSet("timm/oxford-iiit-pet", image_size=224),
    "imagenet-1k": HubSet("ILSVRC/imagenet-1k", image_size=224, unlabelled="test", gated=True),
}


def _digits(folder: Path) -> tuple[str, ...]:
    """scikit-learn's digits: 1,797 images of 8 x 8 in 17 greys; a fifth of each class, by a fixed shuffle, is test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("--data digits: needs scikit-learn; pip install -e '.[demo]'") from error
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rows = Arrays(np.repeat(grey[:, None], 3, axis=1), digits.target.astype(np.int64))
    train, test = hold_out(rows, 0.2, seed=0)
    write_arrays(folder, {"train": train, "test": test})
    return tuple(str(name) for name in digits.target_names)


def _synthetic(folder: Path, classes: int = 10) -> tuple[str, ...]:
    """Noisy copies of ten smooth random pictures, 16 x 16, for trials: learnt in a few epochs."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (classes, 3, 4, 4))
    pictures = np.kron(coarse, np.ones((1, 1, 4, 4)))
    splits = {}
    for name, count in (("train", 1000), ("test", 250)):
        labels = np.arange(count) % classes
        noisy = pictures[labels] + rng.normal(0, 60, (count, 3, 16, 16))
        splits[name] = Arrays(noisy.clip(0, 255).astype(np.uint8), labels.astype(np.int64))
    write_arrays(folder, splits)
    return tuple(f"picture {number}" for number in range(classes))


BUILT_IN = {"digits": _digits, "synthetic": _synthetic}
"""Name -> f(folder), which writes the splits there and returns the class names. Needs no download."""


def with_set_defaults(config: DataConfig) -> DataConfig:
    """Fill in a named set's label column (unless with --no-labels) and image size if the flags are left out.

    A folder of the same name takes precedence and gets no defaults.
    """
    known = HUB_SETS.get(config.source)
    if known is None or Path(config.source).is_dir():
        return config
    label = None if config.no_labels else config.label or known.label
    return dataclasses.replace(config, label=label, image_size=config.image_size or known.image_size)


def find_revision(config: DataConfig) -> str | None:
    """The commit of a Hub set that is to be read: the newest, or if the Hub cannot be asked, the one that was fetched
    last. None for other data, or if there is none.
    """
    source = config.source
    if (
        source in BUILT_IN
        or expand_user(source, "--data").is_dir()
        or is_module_function(source)
        or not _looks_like_id(source)
    ):
        return None
    known = _hub_set(source)
    if _is_commit(known.revision):
        return known.revision
    return _newest_revision(known.address, known.revision) or _fetched_last(known)


def find_source(config: DataConfig, revision: str | None) -> DataSource:
    """Open the data of `config.source`, stored as the flags say or as it fits; `revision` is that of find_revision."""
    source, path = config.source, expand_user(config.source, "--data")
    if path.is_dir() and source in BUILT_IN:
        print_once(f"data: the built-in set {source}, not the folder, which ./{source} names")
    elif path.is_dir() and source in HUB_SETS:
        print_once(f"data: the folder {source}, not the set of that name")
    if source in BUILT_IN:
        return _find_built_in(config)
    if path.is_dir():
        return _find_folder(config, path)
    if is_module_function(source):
        return load_own(config)
    require(not path.is_file(), f"--data {source}: is a file; name the folder that has it, or unpack it")
    require(
        _looks_like_id(source),
        f"--data {source}: no such folder, named set, Hub id (user/name) or module:function;"
        f" {nearest(source, [*BUILT_IN, *HUB_SETS])}",
    )
    return _find_hub_set(config, revision)


def _looks_like_id(source: str) -> bool:
    return source in HUB_SETS or ("/" in source and not source.startswith((".", "/", "~")))


def _find_built_in(config: DataConfig) -> DataSource:
    source = config.source
    for flag in ("label", "image", "image_size", "stored_size"):
        given = getattr(config, flag)
        require(given is None, f"--{flag.replace('_', '-')} {given}: leave it out for the built-in set {source}")
    in_memory = config.decode != "workers" and not config.stream
    require(in_memory, f"--data {source}: the built-in set is in memory; leave --decode workers and --stream out")
    kind = WithoutLabels if config.no_labels else InMemory
    return kind(cached(f"{source}-v1", lambda folder: Facts(BUILT_IN[source](folder))))


def _find_folder(config: DataConfig, path: Path) -> DataSource:
    check_names(path.resolve(), [], config.source)
    listing = scan_folder(path)
    require(listing.sha256 is not None, f"--data {config.source}: the folder is empty")
    images = ImageFolder(path, listing, config.source, labelled=not config.no_labels)
    for note in images.notes:
        print_once(f"data: {note}")
    key = _cache_key(config, str(path.resolve()), listing.sha256)
    content = Content(_cache_key(config, listing.sha256), _cache_key(config, listing.alike))
    if images.is_one:
        return _open_source(config, key, content, lambda **options: read_folder(images, **options), listed=True)
    check_archives(path, listing, config.source)
    tables = TableFolder(path, f"it has {describe_files(listing)}", cache_root() / "data" / f"{key}.datasets")
    return _open_source(config, key, content, lambda **options: load_folder(tables, **options))


def _find_hub_set(config: DataConfig, revision: str | None) -> DataSource:
    source = config.source
    known = _hub_set(source)
    place = known.address if known.folder is None else f"{known.address}/{known.folder}"
    key = _cache_key(config, place, revision or known.revision)
    return _open_source(
        config, key, Content(key, key), lambda **options: _load_hub_set(known, revision, source, **options)
    )


def _open_source(config: DataConfig, key: str, content: Content, load: Callable, listed: bool = False) -> DataSource:
    """`key` identifies the data and where it is; `content` the data alone, as far as known without reading it.

    `listed`: `load` is quick, as it has the list of files already.
    """
    key = hashlib.sha256(f"{key}/{config.image}/{config.skip_broken}/{READER}".encode()).hexdigest()[:16]
    if not config.stream:
        return choose_storage(config, key, load if listed else lambda: open_dataset(key, load))
    return Streaming(config, key, content, load)


def _cache_key(config: DataConfig, *identity: str | None) -> str:
    parts = [*identity, config.label, config.stored_size or config.image_size, VERSION]
    text = json.dumps([*parts, "no labels"] if config.no_labels else parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hub_set(source: str) -> HubSet:
    """The named set, or a set made from a Hub id, user/name or user/name@revision."""
    if source in HUB_SETS:
        return HUB_SETS[source]
    address, _, revision = source.partition("@")
    return HubSet(address, label="", revision=revision or None)


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _newest_revision(name: str, branch: str | None) -> str | None:
    """The newest commit on the Hub; None if the Hub cannot be reached, so that an earlier download is used."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=branch, timeout=10).sha
    except Exception:  # the HTTP client's own errors differ between versions of the library
        return None


def _place(known: HubSet, revision: str | None) -> dict:
    """Where `datasets` finds the set in its repository."""
    return {"revision": revision} | ({"data_dir": known.folder} if known.folder else {})


def _fetched_last(known: HubSet) -> str | None:
    """The commit that `datasets` reads if the Hub cannot be asked for the newest one; None if there is none.

    A line says so if it may not be the branch that was asked for.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = datasets.load_dataset_builder(known.address, **_place(known, known.revision))
    except Exception:  # what is wrong shows when the set is loaded
        return None
    if known.revision is not None and isinstance(builder, Cache):
        said = f"the commit {builder.hash}, fetched before, is read and may not be {known.revision}"
        print_once(f"data: the Hub cannot be reached: {said}")
    return builder.hash


def _load_hub_set(known: HubSet, revision: str | None, source: str, **options) -> Loaded:
    import datasets

    place = _place(known, revision or known.revision)
    try:
        splits = datasets.load_dataset(known.address, **place, **options)
    except Exception as error:  # the HTTP client's own errors differ between versions of the library
        raise UserError(
            f"--data {source}: {known.address} could not be loaded from the Hub ({one_line(root_cause(error))});"
            f" {_terms_advice(known)}check the name and the network, name a local folder with --data, set"
            " HF_HUB_OFFLINE=1 if it was downloaded before, or try --preset digits, which needs no download"
        ) from error
    splits = {name: rows for name, rows in splits.items() if name != known.unlabelled}
    builder = cache(lambda: datasets.load_dataset_builder(known.address, **place))
    if _is_commit(place["revision"]):
        _check_fetched(builder, place["revision"], known, source)
    return compare_hub_files(splits, builder, source, options.get("streaming", False))


def _check_fetched(open_builder: Callable, commit: str, known: HubSet, source: str) -> None:
    """Raise UserError if the Hub cannot be reached and `datasets` read what was fetched last, which is not `commit`."""
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = open_builder()
    except Exception:  # the HTTP client's own errors differ between versions of the library
        return
    require(
        not isinstance(builder, Cache) or builder.hash == commit,
        f"--data {source}: the Hub cannot be reached, and the commit {builder.hash} was fetched last; check the"
        f" network, or name {known.address}@{builder.hash}",
    )


def _terms_advice(known: HubSet) -> str:
    page = f"https://huggingface.co/datasets/{known.address}"
    return f"accept its terms at {page} and log in with `hf auth login`; " if known.gated else ""
