"""Sets that people ask for by name: where they are on the Hub, and what is peculiar to each. No torch here."""

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd.config import DataConfig
from kd.data.cache import Arrays, cached, open_dataset, write_arrays
from kd.data.folder import state_of
from kd.data.splits import hold_out
from kd.data.storage import DataSource, InMemory, choose_storage
from kd.data.stream import Streaming
from kd.errors import UserError, nearest, require
from kd.utils.console import print_once
from kd.utils.images import VERSION


@dataclass(frozen=True)
class HubSet:
    """A set whose columns are known; its one image column needs no name."""

    address: str
    label: str = "label"
    image_size: int | None = None  # --image-size where it is left out; for images that differ in size
    revision: str | None = None  # a commit whose content we know, or a branch; else the newest
    folder: str | None = None  # of the repository, where it holds several forms of the set
    unlabelled: str | None = None  # a split without labels, which is left alone
    gated: bool = False  # its owners want their terms accepted first


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


def find_set(source: str) -> HubSet:
    """What is known of `--data source`: an entry of the table, or a Hub id, of which only address and revision are."""
    if source in HUB_SETS:
        return HUB_SETS[source]
    address, _, revision = source.partition("@")
    return HubSet(address, label="", revision=revision or None)


def with_set_defaults(config: DataConfig) -> DataConfig:
    """The same with the named set's own label column and image size, where the flags are left out.

    A folder of that name comes before the set, and is none of it.
    """
    known = HUB_SETS.get(config.source)
    if known is None or Path(config.source).is_dir():
        return config
    return dataclasses.replace(
        config, label=config.label or known.label, image_size=config.image_size or known.image_size
    )


def advice(known: HubSet) -> str:
    """What else to try where a set could not be loaded."""
    page = f"https://huggingface.co/datasets/{known.address}"
    return f"accept its terms at {page} and log in with `hf auth login`; " if known.gated else ""


#: (kd.images.builtin_data) Data that needs no download.


def _digits(folder: Path) -> tuple[str, ...]:
    """scikit-learn's digits: 1,797 images of 8 x 8 in 17 greys; every fifth of a class, in a fixed shuffle, tests."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("--data digits needs scikit-learn: pip install -e '.[demo]'") from error
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rows = Arrays(np.repeat(grey[:, None], 3, axis=1), digits.target.astype(np.int64))
    train, test = hold_out(rows, 0.2, seed=0)
    write_arrays(folder, {"train": train, "test": test})
    return tuple(str(name) for name in digits.target_names)


def _synthetic(folder: Path, classes: int = 10) -> tuple[str, ...]:
    """Noisy copies of ten smooth random pictures, 16 x 16: learnt in a few epochs, for trying things out."""
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
"""Name -> f(folder), which writes the splits there and returns the class names."""


def find_source(config: DataConfig) -> DataSource:
    """The data, held as it can be."""
    source = config.source
    path = _expand(source)
    if path.is_dir() and source in (*BUILT_IN, *HUB_SETS):
        built_in = f"the built-in set {source}, not the folder, which ./{source} names"
        print_once(f"data: {built_in if source in BUILT_IN else f'the folder {source}, not the set of that name'}")
    if source in BUILT_IN:
        for flag in ("label", "image_size", "stored_size"):
            given = getattr(config, flag)
            require(given is None, f"--{flag.replace('_', '-')} {given}: leave it out for the built-in set {source}")
        held = config.decode != "workers" and not config.stream
        require(held, f"--data {source}: the built-in set is in memory; leave --decode workers and --stream out")
        return InMemory(*cached(f"{source}-v1", BUILT_IN[source]))
    if path.is_dir():
        state, layout = state_of(path)
        require(state is not None, f"--data {source}: the folder is empty")
        if left_out := layout.check(source):
            print_once(f"data: {left_out}")
        key, content = _key(str(path.resolve()), state, config), _key(state, config)
        return _data_source(config, key, content, lambda **how: _open_folder(path, **how))
    looks_like_id = source in HUB_SETS or ("/" in source and not source.startswith((".", "/", "~")))
    require(
        looks_like_id,
        f"--data {source}: no such folder, named set or Hub id (user/name); {nearest(source, [*BUILT_IN, *HUB_SETS])}",
    )
    known = find_set(source)
    revision = known.revision if _is_commit(known.revision) else _newest_revision(known.address, known.revision)
    place = known.address if known.folder is None else f"{known.address}/{known.folder}"
    key = _key(place, revision, config)
    return _data_source(config, key, key, lambda **how: _open_hub(known, revision, source, **how))


def _expand(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise UserError(f"--data {source}: no such folder ({error})") from error


def _data_source(config: DataConfig, key: str, content: str, load: Callable) -> DataSource:
    """`key` says where it lies too, `content` only what it holds, as far as that is known without reading it."""
    if not config.stream:
        return choose_storage(config, key, lambda: open_dataset(key, load))
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
