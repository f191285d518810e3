"""Find the image and label columns of a data set, and encode labels as class numbers."""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from kd.config import DataConfig
from kd.errors import NoLabels, require

UNLABELLED = -1  # the label of every image of data without labels

LARGEST_LABEL = 99_999  # a larger number is no class; a column of ids would fill the memory

IMAGE_NAMES = ("image", "img")  # taken as images without --image

LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")  # taken as labels without --label

SHOWN = 5  # values in a line


class Columns(NamedTuple):
    image: str
    label: str  # "" without labels
    classes: tuple[str, ...]
    numbers: dict[int | str, int]  # class number of each value of the label column
    note: str = ""  # what is to be said about the labels

    def __str__(self) -> str:
        return f"columns {self.image} and {self.label}" if self.label else f"column {self.image}, no labels read"


def find_columns(features, unique: Callable[[str], list], config: DataConfig) -> Columns:
    """Image column, label column and classes, from `datasets` features; `unique` gives a column's values.

    One clear choice by name or by type is taken. With --no-labels the image column alone.
    Raises UserError listing the columns for none or several, of which NoLabels if there is no label column.
    """
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    source = config.source
    listed = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
    images = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
    require(bool(images), f"--data {source}: no image column; it has {listed or 'no columns'}")
    image = config.image or _only(images, IMAGE_NAMES)
    require(image is not None, f"--data {source}: several image columns ({', '.join(images)}); choose one with --image")
    require(image in images, f"--image {image}: no such image column in {source}; it has {listed}")
    if config.no_labels:
        return Columns(image, "", (), {})
    label = _find_label(features, config, listed)
    if isinstance(features[label], ClassLabel):
        classes = tuple(features[label].names)
        columns = Columns(image, label, classes, _by_number(classes))
    else:
        columns = _plain_columns(features[label], image, label, lambda: unique(label), f"{source} has {listed}")
    check_class_names(columns.classes, source)
    return columns


def _find_label(features, config: DataConfig, listed: str) -> str:
    """The label column: --label, else the only one with a usual name and classes, or the only one with either."""
    from datasets import ClassLabel

    source, label = config.source, config.label
    require(label is None or label in features, f"--label {label}: no such column in {source}; it has {listed}")
    typed = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    named = [name for name in LABEL_NAMES if name in features]
    candidates = list(dict.fromkeys(typed + named))
    if not (label or candidates):
        raise NoLabels(f"--data {source}: no label column; it has {listed}; name one with --label")
    label = label or _only([name for name in named if name in typed], ()) or _only(candidates, ())
    require(
        label is not None, f"--data {source}: several label columns ({', '.join(candidates)}); choose one with --label"
    )
    return label


def _only(names: list[str], preferred: tuple[str, ...]) -> str | None:
    """The only name, or the only preferred one; None if there is no or more than one."""
    chosen = [name for name in names if name in preferred] if len(names) > 1 else names
    return chosen[0] if len(chosen) == 1 else None


def _by_number(classes: tuple[str, ...]) -> dict[int | str, int]:
    named = {name: number for number, name in enumerate(classes)}
    return named | {number: number for number in range(len(classes))}


def _plain_columns(kind, image: str, label: str, unique: Callable[[], list], listed: str) -> Columns:
    """Columns whose labels are plain numbers or names; the classes are the values that exist, sorted."""
    from datasets import Value

    require(isinstance(kind, Value), f"--label {label}: needs numbers or names, not {type(kind).__name__}; {listed}")
    values = unique()
    require(
        all(isinstance(value, int | str) for value in values) and len({type(value) for value in values}) == 1,
        f"--label {label}: needs whole numbers or names, one for each row; {listed}",
    )
    values = sorted(values)
    least, most = values[0], values[-1]
    if isinstance(least, str):
        require(
            all(value.strip() for value in values), f"--label {label}: a name is empty; {listed}; name or drop its rows"
        )
    else:
        require(least >= 0, f"--label {label}: there is the label {least}; number classes from 0; {listed}")
        require(
            most <= LARGEST_LABEL,
            f"--label {label}: there is the label {most}, above {LARGEST_LABEL}; number classes from 0, or use names;"
            f" {listed}",
        )
    classes = tuple(str(int(value)) if isinstance(value, int) else value for value in values)
    numbers = {value: number for number, value in enumerate(values)}
    note = ""
    if isinstance(most, int) and most >= len(values):
        shown = ", ".join(classes[:SHOWN]) + (", ..." if len(classes) > SHOWN else "")
        note = (
            f"the {len(classes)} classes are the numbers that occur in column {label} ({shown}), not all up to {most}"
        )
    return Columns(image, label, classes, numbers, note)


def check_class_names(classes: Sequence[str], source: str) -> None:
    """Raises UserError for names that differ only in Unicode form, case or spaces around: one class written twice.

    Single letters may differ in case: they are what sets of handwriting show.
    """
    alike = defaultdict(list)
    for name in classes:
        form = unicodedata.normalize("NFC", name).strip()
        alike[form if len(form) == 1 else unicodedata.normalize("NFC", form.casefold())].append(name)
    doubled = next((names for names in alike.values() if len(names) > 1), [])
    shown = " and ".join(f"{name!r} ({_code_points(name)})" for name in doubled)
    require(
        not doubled,
        f"--data {source}: class names that differ in Unicode form, case or spaces only: {shown}; write one of them"
        " everywhere",
    )


def _code_points(name: str) -> str:
    return " ".join(f"U+{ord(character):04X}" for character in name)


def read_labels(rows, columns: Columns, split: str) -> np.ndarray:
    """The labels of a `datasets` split as int64; UNLABELLED for each row, and nothing is read, without labels."""
    if not columns.label:
        return np.full(len(rows), UNLABELLED, np.int64)
    return encode_labels(rows[columns.label], columns, split)


def encode_labels(labels: Sequence, columns: Columns, split: str) -> np.ndarray:
    """Labels (names or numbers) as int64. Raises UserError naming the split and row of one that is no class."""
    numbers = np.empty(len(labels), np.int64)
    for row, label in enumerate(labels):
        number = columns.numbers.get(label)
        require(
            number is not None,
            f"{split} row {row}: label {label!r} is not one of the {len(columns.classes)} classes of column"
            f" {columns.label}; correct or drop the row",
        )
        numbers[row] = number
    return numbers


def is_unlabelled(labels: Collection) -> bool:
    """Whether a split's labels are all missing: None, or the -1 that test splits of challenges have."""
    return len(labels) > 0 and all(label is None or label == UNLABELLED for label in labels)


def check_columns(columns: Columns, present: Collection[str], split: str, source: str) -> None:
    """Raises UserError if a split lacks the image or the label column."""
    missing = {columns.image, columns.label} - {"", *present}
    require(not missing, f"--data {source}: its {split} split has no column {', '.join(sorted(missing))}")
