"""Load any image classification set as three splits of uint8 images.

kd/data/sources.py finds the data and kd/data/storage.py chooses how it is stored. The validation split is held out of
the training split, by class; the test split is the data's own and is read once, at the end of a run.
Data without labels (--no-labels) has no test split; its validation split is held out of all images alike.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd.config import DataConfig, RunConfig
from kd.config.presets import PRESETS
from kd.data.cache import Arrays, trusting
from kd.data.rows import Rows
from kd.data.sources import BUILT_IN, find_revision, find_source, with_set_defaults
from kd.data.splits import hold_out, keep_labels, long_tail, select
from kd.data.storage import SPLITS, DataSource
from kd.errors import NoLabels, require, reworded
from kd.utils.console import print_once
from kd.utils.processes import all_do, from_main, node, node_first

NO_PROBE = RunConfig()

OF_PRESETS = {preset["data"].val_fraction for preset in PRESETS.values() if "data" in preset}
"""Values of --val-fraction that a preset may have set, so that they are no mistake of the user's."""

TEST_SEED = 0  # of a test split that is held out: the same images for every --split-seed


@dataclass(frozen=True)
class Data:
    train: Rows
    val: Rows | None
    test: Rows | None  # None without labels
    classes: tuple[str, ...]  # without labels empty, until the teacher's are known
    mean: tuple[float, ...]  # of the training split, per channel, as shares of 255
    std: tuple[float, ...]
    fingerprint: str  # sha256 of all rows and class names; of a stream, of its files' names, sizes and times
    size: tuple[int, int]  # height and width of every image as networks see it
    storage: str = "in memory"  # in words: how the images are stored, and why
    test_split: str = "test"  # "validation" if the data has no test split but that
    own_validation: bool = False  # whether `val` is a split of the data's own, not a part of its training split
    labelled: bool = True  # False: every label is -1, and nothing may depend on it
    probe: "Data | None" = None  # the labelled set of --probe

    def close(self) -> None:
        """End what the splits, the probe's too, keep between epochs; reading them starts it again."""
        for split in filter(None, (self.train, self.val, self.test)):
            split.close()
        if self.probe is not None:
            self.probe.close()


def load_data(config: DataConfig, run: RunConfig = NO_PROBE, needs_labels: bool = True) -> Data:
    """Load the three splits of `config.source`, or its images alone with --no-labels, and those of the run's --probe.

    All processes call this together; one on each machine decodes, counts and hashes what is kept on its disk. Not
    `needs_labels`: as with --no-labels if no labels are found; prints that.
    Raises: UserError for a source that does not exist or cannot be reached, a broken row, a label out of range, or data
    that differ between machines; of which NoLabels if no labels are found.
    """
    config = with_set_defaults(config)
    config.check_sizes()
    revision = from_main(lambda: find_revision(config))  # asked once: two answers might differ

    def load(first: bool) -> Data:
        with trusting(not first):
            return _load_with_or_without(config, revision, needs_labels)

    data = node_first(load)
    digest = _digest(data, config)
    alike = digest == from_main(lambda: digest)
    all_do(lambda: require(alike, f"--data {config.source}: {node()} has other data than the main process; copy it"))
    data = _named_as_on_main(data) if config.stream else data
    if run.probe:
        data = dataclasses.replace(data, probe=load_probe(run.probe, config, data.size, run.probe_label))
    return data


def _load_with_or_without(config: DataConfig, revision: str | None, needs_labels: bool) -> Data:
    try:
        return _load(config, revision)
    except NoLabels as error:
        if needs_labels:
            raise
        found = error.found.removeprefix(f"--data {config.source}: ").partition("; ")[0]  # without the remedy
        print_once(f"data: without labels: {found}")
    without = dataclasses.replace(config, no_labels=True)
    without.check()
    return _load(without, revision)


def _named_as_on_main(data: Data) -> Data:
    """The same stream by the main process's name for it, which has the times of the files there."""
    fingerprint = from_main(lambda: data.fingerprint)
    splits = {name: getattr(data, name) for name in ("train", "val", "test")}
    named = {name: rows and dataclasses.replace(rows, fingerprint=fingerprint) for name, rows in splits.items()}
    return dataclasses.replace(data, fingerprint=fingerprint, **named)


def _digest(data: Data, config: DataConfig) -> str:
    """Of all that must be the same on every machine. Of a stream the files' times need not be."""
    content = [
        data.classes,
        data.mean,
        data.std,
        data.size,
        data.test_split,
        data.train.alike if config.stream else data.fingerprint,
    ]
    digest = hashlib.sha256(json.dumps(content).encode())
    for split in (data.train, data.val, data.test):
        if split is not None:
            digest.update(split.labels.numpy())
    return digest.hexdigest()


def _load(config: DataConfig, revision: str | None) -> Data:
    source = find_source(config, revision)
    for note in source.notes:
        print_once(f"data: {note}")
    if config.no_labels:
        return _load_unlabelled(config, source)
    splits, classes = source.splits, source.classes
    require(
        len(classes) >= 2,
        f"--data {config.source}: has one class only ({', '.join(classes)}); two or more are needed: choose another"
        " column with --label, or other data",
    )
    if config.classes is not None:
        require(config.classes <= len(classes), f"--classes {config.classes}: {config.source} has {len(classes)}")
        classes = classes[: config.classes]
        splits = {name: select(split, split.labels < config.classes) for name, split in splits.items()}
    train, val, test, test_split = _three_splits(splits, config)
    # After the hold-out: validation keeps the test split's class frequencies and is the same for every --imbalance.
    train = long_tail(train, config.imbalance, len(classes), config.split_seed)
    whole, train = train, keep_labels(train, config.label_share, config.split_seed)
    parts = {"training": train, "validation": val, "test": test}
    _check_parts(parts, config)
    _print_summary(config, source.storage, parts, classes)
    source.check_images([split for split in (test, val) if split is not None])
    # Of all training images: every --label-share normalises alike, and as a labelled run that it starts from (--init).
    statistics = source.statistics(whole)
    if train is not whole:
        _print_share(config.label_share, len(whole.labels), train, val)
        source.hash_rows(train)
    train, val, test = (split and source.rows(split) for split in (train, val, test))
    own = val is not None and test_split == "test" and SPLITS[1] in source.splits
    size = _size(config, train)
    return Data(train, val, test, classes, *statistics, size, source.storage, test_split, own_validation=own)


def _size(config: DataConfig, train: Rows) -> tuple[int, int]:
    """Height and width of every image as networks see it."""
    return (config.image_size,) * 2 if config.image_size else train.size


def _load_unlabelled(config: DataConfig, source: DataSource) -> Data:
    """Training and validation split of images without labels."""
    train, val = _validation(*(source.splits.get(name) for name in SPLITS[:2]), config)
    parts = {"training": train, "validation": val}
    _check_parts(parts, config)
    sizes = " and ".join(f"{len(split.labels)} {name}" for name, split in parts.items() if split is not None)
    print_once(f"data: {source.storage}; {sizes} images without labels")
    source.check_images([val] if val is not None else [])
    statistics = source.statistics(train)
    train, val = (split and source.rows(split) for split in (train, val))
    return Data(train, val, None, (), *statistics, _size(config, train), source.storage, labelled=False)


def load_probe(
    source: str, data: DataConfig, size: tuple[int, int], label: str | None = None, option: str = "--probe"
) -> Data:
    """The labelled set `source` for a run on `data` whose network sees images of `size` (height, width).

    Its images have that size if they can be stored so, else their own. Its splits do not depend on the run's flags,
    unless it is the labelled set that the run is trained on: then they are the run's, so that no image that was trained
    on with its label is scored.
    Raises: UserError as load_data does, in terms of the flag `option`, and for a set without labels.
    """
    same = _is_same(source, data.source)
    config = DataConfig(
        source,
        label=label or (data.label if same else None),
        image=data.image if same else None,
        classes=data.classes if same else None,
        image_size=size[0] if source not in BUILT_IN and size[0] == size[1] else None,
        stored_size=data.stored_size if source not in BUILT_IN and size[0] == size[1] else None,
        **(_held_out_as(data) if same and not data.no_labels else {}),
        decode=data.decode if same else "auto",
        stream=data.stream and same,
        workers=data.workers,
        skip_broken=data.skip_broken,
    )
    names = {"--data": option, "--label": "--probe-label" if option == "--probe" else "--label"}

    def change(text: str) -> str:
        return re.sub(r"--(?:data|label)\b(?!-)", lambda match: names[match[0]], text.removesuffix(NoLabels.REMEDY))

    with reworded(change):
        probe = load_data(config)
        labelled = all(bool((split.labels >= 0).all()) for split in (probe.train, probe.test))
        require(labelled, f"--data {source}: its images have no labels; name a labelled set")
    return probe


def _is_same(source: str, other: str) -> bool:
    """Whether both name one source, however a folder is written."""
    folders = [Path(name).expanduser() for name in (source, other)]
    return source == other or (all(map(Path.is_dir, folders)) and folders[0].resolve() == folders[1].resolve())


def _held_out_as(data: DataConfig) -> dict:
    return {name: getattr(data, name) for name in ("val_fraction", "split_seed", "test_fraction")}


def _three_splits(splits: dict[str, Arrays], config: DataConfig) -> tuple[Arrays, Arrays | None, Arrays, str]:
    """Training, validation and test split, and the name of the split that is scored at the end."""
    train, val, test = (splits.get(name) for name in SPLITS)
    name, fraction, default = "test", config.test_fraction, DataConfig.test_fraction
    own = [name for name, split in (("test", test), ("validation", val)) if split is not None]
    require(
        not own or fraction == default,
        f"--test-fraction {fraction}: {config.source} has a {(own or [''])[0]} split of its own; leave it out",
    )
    if test is None and val is not None:  # the literature reports a set's validation split if that is all it has
        val, test, name = None, val, "validation"
        print_once(
            "data: no test split: the validation split is scored at the end in its place, and is not looked at before"
        )
    elif test is None:
        require(
            fraction > 0,
            f"--data {config.source}: only a train split; give a test split, or --test-fraction to hold one out",
        )
        train, test = hold_out(train, fraction, TEST_SEED)
        print_once(f"data: only a train split: {fraction:g} of each class is held out for testing (--test-fraction)")
    return *_validation(train, val, config), test, name


def _validation(train: Arrays, val: Arrays | None, config: DataConfig) -> tuple[Arrays, Arrays | None]:
    """Training and validation split: `val`, that of the data's own, unless --val-fraction 0; else held out."""
    fraction = config.val_fraction
    if val is None:
        return hold_out(train, fraction, config.split_seed)
    if fraction == 0:
        print_once("data: the validation split is left out, as --val-fraction 0 says")
        return train, None
    if fraction != DataConfig.val_fraction:
        require(
            fraction in OF_PRESETS,
            f"--val-fraction {fraction}: {config.source} has a validation split of its own; leave it out, or give 0 to"
            " train without validation",
        )
        print_once(f"data: a validation split of its own, so --val-fraction {fraction} has no effect")
    return train, val


def _check_parts(parts: dict[str, Arrays | None], config: DataConfig) -> None:
    """Raise UserError for a split without images."""
    remedies = {
        "validation": "every class has one training image: give --val-fraction 0 to train without validation"
        if config.val_fraction > 0 and not config.no_labels and _one_each(parts["training"].labels)
        else "give a larger --val-fraction, or 0 to train without validation",
        "test": "each class needs two images to hold one out",
    }
    for name, split in parts.items():
        require(
            split is None or len(split.labels) > 0,
            f"--data {config.source}: the {name} split is empty; {remedies.get(name, 'add images')}",
        )


def _one_each(labels: np.ndarray) -> bool:
    """Whether no class has a second image."""
    return bool(np.bincount(labels).max(initial=0) == 1)


def _print_share(share: float, whole: int, train: Arrays, val: Arrays | None) -> None:
    counts = np.bincount(train.labels)
    least, most = counts[counts > 0].min(), counts.max()
    each = f"{least} to {most}" if least < most else f"{most}"
    left = f"{len(train.labels)} of {whole} training images, {each} of each class"
    stay = "test stays whole" if val is None else f"validation ({len(val.labels)} labelled images) and test stay whole"
    print_once(f"data: --label-share {share:g} leaves {left}; {stay}")


def _print_summary(config: DataConfig, storage: str, parts: dict[str, Arrays | None], classes: tuple[str, ...]) -> None:
    """Print storage and sizes of the splits, and classes that are in one of them only."""
    sizes = ", ".join(f"{len(split.labels)} {name}" for name, split in parts.items() if split is not None)
    if config.source not in BUILT_IN:
        print_once(f"data: {storage}; {sizes} images of {len(classes)} classes")
    train, test = parts["training"].labels, parts["test"].labels
    found = {
        "classes of the test split without a training image": np.setdiff1d(test, train),
        "classes without a test image": np.setdiff1d(train, test),
        "classes without an image": np.setdiff1d(np.arange(len(classes)), np.union1d(train, test)),
    }
    for what, missing in found.items():
        if len(missing):
            names = ", ".join(classes[label] for label in missing[:3].tolist()) + (", ..." if len(missing) > 3 else "")
            print_once(f"data: {what}: {len(missing)} ({names})")
