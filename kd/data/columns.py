"""Which columns of a data set hold images and labels, and the labels as numbers."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from kd.errors import require

LARGEST_LABEL = 99_999  # each number up to the largest is a class, and a column of something else would fill the memory


class Columns(NamedTuple):
    image: str
    label: str
    classes: tuple[str, ...]


def find_columns(features, unique: Callable[[str], list], label: str | None, source: str) -> Columns:
    """Image and label column and the class names, from `datasets` features; `unique` gives a column's values.

    Raises UserError listing the columns there are.
    """
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    there = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
    images = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
    require(bool(images), f"--data {source}: no image column; it has {there or 'no columns'}")
    named = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    plain = [name for name in ("label", "labels", "fine_label", "target", "class") if name in features]
    require(label is None or label in features, f"--label {label}: no such column in {source}; it has {there}")
    chosen = label or next(iter(named + plain), None)
    require(chosen is not None, f"--data {source}: no label column; it has {there}; name one with --label")
    if isinstance(features[chosen], ClassLabel):
        return Columns(images[0], chosen, tuple(features[chosen].names))
    kind = features[chosen]
    require(
        isinstance(kind, Value),
        f"--label {chosen}: holds no numbers or names but {type(kind).__name__}; it has {there}",
    )
    values = unique(chosen)
    require(
        all(isinstance(value, int | str) for value in values) and len({type(value) for value in values}) == 1,
        f"--label {chosen}: needs whole numbers or names, one for each row of {source}",
    )
    if isinstance(values[0], int):
        require(min(values) >= 0, f"--label {chosen}: {source} has the label {min(values)}; labels start at 0")
        most = f"numbers name classes up to {LARGEST_LABEL}; number them from 0, or use names"
        require(max(values) <= LARGEST_LABEL, f"--label {chosen}: {source} has the label {max(values)}; {most}")
        return Columns(images[0], chosen, tuple(str(number) for number in range(max(values) + 1)))
    return Columns(images[0], chosen, tuple(sorted(values)))


def numbers_of(labels: Sequence, classes: tuple[str, ...], split: str) -> np.ndarray:
    """Labels (names or numbers) as int64. Raises UserError naming the split and row of one that is no class."""
    lookup = {name: number for number, name in enumerate(classes)}
    numbers = np.empty(len(labels), np.int64)
    for row, label in enumerate(labels):
        number = lookup.get(label) if isinstance(label, str) else label
        require(
            isinstance(number, int) and 0 <= number < len(classes),
            f"{split} row {row}: label {label!r} is none of the {len(classes)} classes; mend or drop the row",
        )
        numbers[row] = number
    return numbers


def check_columns(columns: Columns, there: Collection[str], split: str, source: str) -> None:
    missing = {columns.image, columns.label} - set(there)
    require(not missing, f"--data {source}: its {split} split has no column {', '.join(sorted(missing))}")
