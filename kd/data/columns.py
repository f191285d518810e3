"""Find the image and label columns of a data set, and encode labels as class numbers."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from kd.errors import require

LARGEST_LABEL = 99_999  # every number up to the largest label is a class; a column of ids would fill the memory

LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")  # taken as labels without --label, in this order


class Columns(NamedTuple):
    image: str
    label: str
    classes: tuple[str, ...]


def find_columns(features, unique: Callable[[str], list], label: str | None, source: str) -> Columns:
    """Image column, label column and class names, from `datasets` features; `unique` gives a column's values.

    Raises UserError listing the columns.
    """
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    listed = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
    images = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
    require(bool(images), f"--data {source}: no image column; it has {listed or 'no columns'}")
    typed = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    named = [name for name in LABEL_NAMES if name in features]
    require(label is None or label in features, f"--label {label}: no such column in {source}; it has {listed}")
    chosen = label or next(iter(typed + named), None)
    require(chosen is not None, f"--data {source}: no label column; it has {listed}; name one with --label")
    if isinstance(features[chosen], ClassLabel):
        return Columns(images[0], chosen, tuple(features[chosen].names))
    return Columns(images[0], chosen, _class_names(features, chosen, unique, source, listed))


def _class_names(features, label: str, unique: Callable[[str], list], source: str, listed: str) -> tuple[str, ...]:
    """Class names of a column of plain numbers (from 0 to the largest) or names (sorted)."""
    from datasets import Value

    require(
        isinstance(features[label], Value),
        f"--label {label}: needs numbers or names, not {type(features[label]).__name__}; {source} has {listed}",
    )
    values = unique(label)
    require(
        all(isinstance(value, int | str) for value in values) and len({type(value) for value in values}) == 1,
        f"--label {label}: needs whole numbers or names, one for each row of {source}",
    )
    if isinstance(values[0], str):
        return tuple(sorted(values))
    least, most = min(values), max(values)
    require(least >= 0, f"--label {label}: {source} has the label {least}; number classes from 0")
    require(
        most <= LARGEST_LABEL,
        f"--label {label}: {source} has the label {most}, above {LARGEST_LABEL}; number classes from 0, or use names",
    )
    return tuple(str(number) for number in range(most + 1))


def encode_labels(labels: Sequence, classes: tuple[str, ...], split: str) -> np.ndarray:
    """Labels (names or numbers) as int64. Raises UserError naming the split and row of one that is no class."""
    numbers_by_name = {name: number for number, name in enumerate(classes)}
    numbers = np.empty(len(labels), np.int64)
    for row, label in enumerate(labels):
        number = numbers_by_name.get(label) if isinstance(label, str) else label
        require(
            isinstance(number, int) and 0 <= number < len(classes),
            f"{split} row {row}: label {label!r} is not one of the {len(classes)} classes; correct or drop the row",
        )
        numbers[row] = number
    return numbers


def check_columns(columns: Columns, present: Collection[str], split: str, source: str) -> None:
    """Raises UserError if a split lacks the image or the label column."""
    missing = {columns.image, columns.label} - set(present)
    require(not missing, f"--data {source}: its {split} split has no column {', '.join(sorted(missing))}")
