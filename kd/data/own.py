"""Data of the user's own: a module:function that returns {"train": dataset, "test": dataset}.

Each is map-style: it has a length and gives (image, class number) pairs, as torchvision's data sets do; with
--no-labels images alone, or pairs whose second part is not looked at.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from kd.config import DataConfig
from kd.data.cache import Arrays, Decoded, Facts, hash_arrays
from kd.data.columns import UNLABELLED, check_class_names
from kd.data.storage import SHARE, InMemory, handle_broken, rename_splits, unused_splits, used_splits
from kd.data.tables import shown_names
from kd.errors import NoLabels, require
from kd.utils.images import crop_and_resize, open_image, to_array
from kd.utils.system import memory_limit
from kd.utils.users_own import call_function, import_function

FORM = '{"train": dataset, "test": dataset}, each giving (image, class number) pairs'

READ_TWICE = 16  # readable rows of a split, to find random transforms: one row misses every second flip


def load_own(config: DataConfig) -> InMemory:
    """Call the user's function, and read every image once.

    Raises: UserError for anything but pairs as in FORM, UsersOwnError if the user's code fails.
    """
    source = config.source
    for flag in ("label", "image"):
        given = getattr(config, flag)
        require(given is None, f"--{flag} {given}: leave it out; {source} gives labels and images itself")
    in_memory = config.decode != "workers" and not config.stream
    require(in_memory, f"--data {source}: is read into memory; leave --decode workers and --stream out")
    function = import_function(source, f"--data {source}")
    returned = call_function(function, source, f"--data {source}")
    require(
        isinstance(returned, dict) and bool(returned) and all(isinstance(name, str) for name in returned),
        f"--data {source}: returned {type(returned).__name__}; it must return {FORM}",
    )
    every = rename_splits(returned, source)
    datasets = {name: every[name] for name in used_splits(config) if name in every}
    for name, rows in datasets.items():
        require(
            hasattr(rows, "__len__") and hasattr(rows, "__getitem__"),
            f"--data {source}: its {name} is {type(rows).__name__}, without a length or rows by number; it must return"
            f" {FORM}",
        )
        require(len(rows) > 0, f"--data {source}: the {name} split is empty")
    broken: dict[str, list[str]] = {}
    splits: dict[str, Arrays] = {}
    for name, rows in datasets.items():  # train first
        shape = splits["train"].images.shape[1:] if splits else None
        splits[name] = _read_split(rows, name, config, broken.setdefault(name, []), shape)
    classes, differing = (), []
    if not config.no_labels:
        named = _named(datasets)
        classes = _class_names(named, splits, source)
        splits, differing = _number_alike(splits, named, classes, source)
    notes = (*unused_splits(every, config), *differing, *handle_broken(broken, config.skip_broken))
    data = InMemory(Decoded(splits, Facts(classes, notes=notes), hash_arrays(splits, classes)))
    data.storage = f"in memory, read from {source}"
    return data


def _read_split(rows, split: str, config: DataConfig, broken: list[str], shape: tuple[int, int, int] | None) -> Arrays:
    """All images and labels of a split; what is wrong with those that cannot be read goes to `broken`.

    Raises UserError for an image that is not of `shape`; if that is None, not of the first one's.
    """
    size, source = config.stored_size or config.image_size, config.source
    images, labels = None, []
    for row, (pixels, label) in _pairs(rows, split, size, config, broken):
        if images is None:
            size_in_memory, limit = len(rows) * pixels.nbytes, memory_limit()
            require(
                size_in_memory <= SHARE * limit,
                f"--data {source}: {size_in_memory / 1e9:.3g} GB of {split} images do not fit half of"
                f" {limit / 1e9:.3g} GB of memory; give a smaller --image-size, or save them as files",
            )
            shape = shape or pixels.shape
            images = np.empty((len(rows), *shape), np.uint8)
        require(
            pixels.shape == shape,
            f"--data {source}: {split} row {row} is {pixels.shape[2]} x {pixels.shape[1]}, others {shape[2]} x"
            f" {shape[1]}; give --image-size N to bring all to one size",
        )
        images[len(labels)] = pixels
        labels.append(label)
    if images is None:
        handle_broken({split: broken}, skip=False)
    return Arrays(images[: len(labels)], np.array(labels, np.int64))


UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # of Pillow and the file system


def _pairs(
    rows, split: str, size: int | None, config: DataConfig, broken: list[str]
) -> Iterator[tuple[int, tuple[UInt8[np.ndarray, "3 h w"], int]]]:
    left = READ_TWICE
    for row in range(len(rows)):
        where = f"--data {config.source}: {split} row {row}"
        try:  # a lazy image is read in _pixels
            image, number = _image_and_label(rows[row], where, config.no_labels)
            pixels = _pixels(image, size, where)
        except UNREADABLE as error:
            broken.append(f"{split} row {row}: not a readable image ({error})")
            continue
        if left > 0:
            left -= 1
            again = _pixels(_image_and_label(rows[row], where, config.no_labels)[0], size, where)
            require(
                np.array_equal(pixels, again),
                f"{where}: differs when it is read again; leave random transforms out, kd augments images itself",
            )
        yield row, (pixels, number)


def _image_and_label(pair, where: str, no_labels: bool) -> tuple[object, int]:
    """The parts of what a row gives."""
    if no_labels:
        return (pair[0] if isinstance(pair, tuple | list) and pair else pair), UNLABELLED
    if isinstance(pair, Image.Image | torch.Tensor):
        raise NoLabels(f"{where}: is an image without a label; it must return {FORM}")
    require(isinstance(pair, tuple | list) and len(pair) == 2, f"{where}: is no pair; it must return {FORM}")
    label = pair[1]
    number = label.item() if isinstance(label, torch.Tensor | np.generic) and np.ndim(label) == 0 else label
    require(
        isinstance(number, int) and number >= 0,
        f"{where}: label {label!r} is no class number; give whole numbers from 0",
    )
    return pair[0], int(number)


def _pixels(image, size: int | None, where: str) -> UInt8[np.ndarray, "3 h w"]:
    if isinstance(image, torch.Tensor):
        channels = image.shape[0] if image.ndim == 3 else 0
        require(
            image.dtype == torch.uint8 and channels in (1, 3),
            f"{where}: gives a {str(image.dtype).removeprefix('torch.')} tensor of {tuple(image.shape)}; give PIL"
            " images, or uint8 tensors of 3 x h x w, without ToTensor and Normalize",
        )
        image = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    require(isinstance(image, Image.Image), f"{where}: gives {type(image).__name__}; give PIL images or uint8 tensors")
    try:
        image = open_image(image)
    except ValueError as error:  # greys whose white is unknown
        raise OSError(str(error)) from error
    return to_array(image if size is None else crop_and_resize(image, size, size))


def _named(datasets: dict) -> dict[str, tuple[str, ...]]:
    """Each split's own names of its classes (`classes`, as torchvision's sets have); none if train has none."""
    listed = {name: getattr(rows, "classes", None) for name, rows in datasets.items()}
    named = {name: tuple(map(str, names)) for name, names in listed.items() if isinstance(names, list | tuple)}
    return named if "train" in named else {}


def _class_names(named: dict[str, tuple[str, ...]], splits: dict[str, Arrays], source: str) -> tuple[str, ...]:
    """The training split's names, else the numbers."""
    most = {name: int(split.labels.max()) for name, split in splits.items()}
    classes = named.get("train", tuple(map(str, range(max(most.values()) + 1))))
    for name, label in most.items():
        count = len(named.get(name, classes))
        require(label < count, f"--data {source}: there is the label {label}, and {count} class names")
    require(len(set(classes)) == len(classes), f"--data {source}: two classes have one name ({', '.join(classes[:5])})")
    check_class_names(classes, source)
    return classes


def _number_alike(
    splits: dict[str, Arrays], named: dict[str, tuple[str, ...]], classes: tuple[str, ...], source: str
) -> tuple[dict[str, Arrays], list[str]]:
    """The splits with labels as numbers of `classes`, by the names of each, and sentences on those that differ."""
    numbers, notes = {name: number for number, name in enumerate(classes)}, []
    for split, names in named.items():
        if names == classes:
            continue
        unknown = [name for name in names if name not in numbers]
        require(
            not unknown,
            f"--data {source}: its {split} split has the class {(unknown or [''])[0]}, and train has"
            f" {shown_names(classes)}; give both the same class names",
        )
        labels = np.array([numbers[name] for name in names])[splits[split].labels]
        splits = splits | {split: splits[split]._replace(labels=labels)}
        notes.append(
            f"train and {split} name the classes differently ({shown_names(classes)} and {shown_names(names)}):"
            " numbered alike, by name"
        )
    return splits, notes
