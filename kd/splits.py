"""Rows of decoded arrays, kept or held out."""

import numpy as np

from kd.decode import Arrays


def hold_out(train: Arrays, fraction: float, seed: int) -> tuple[Arrays, Arrays | None]:
    """Split `fraction` of every class off for validation (at least one of a class with two or more)."""
    if fraction == 0:
        return train, None
    held = np.zeros(len(train.labels), bool)
    for label in np.unique(train.labels):
        rows = np.flatnonzero(train.labels == label)
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held[np.random.default_rng([seed, int(label)]).permutation(rows)[:count]] = True
    return keep(train, ~held), keep(train, held)


def keep(split: Arrays, mask: np.ndarray) -> Arrays:
    # Boolean indexing of a memory map gives a plain array; the map itself is never written.
    return split if mask.all() else Arrays(np.asarray(split.images[mask]), split.labels[mask])
