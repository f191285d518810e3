"""Select rows of a split: validation held out of training, long-tailed subsets, and a share of the labels."""

import numpy as np

from kd.data.cache import Arrays
from kd.data.columns import UNLABELLED
from kd.errors import require

IMBALANCED = 1.5  # from this ratio of largest to smallest class on, a set counts as imbalanced


def hold_out(train: Arrays, fraction: float, seed: int) -> tuple[Arrays, Arrays | None]:
    """Split `fraction` of every class off for validation, at least one image of a class with two or more.

    Images without labels are one class.
    """
    if fraction == 0:
        return train, None
    held_out = np.zeros(len(train.labels), bool)
    for label in np.unique(train.labels):
        rows = np.flatnonzero(train.labels == label)
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        key = [seed] if label == UNLABELLED else [seed, int(label)]
        held_out[np.random.default_rng(key).permutation(rows)[:count]] = True
    return select(train, ~held_out), select(train, held_out)


def select(split: Arrays, mask: np.ndarray) -> Arrays:
    """The rows where `mask` is true."""
    return split if mask.all() else Arrays(split.images[mask], split.labels[mask])


def is_imbalanced(labels: np.ndarray, classes: int) -> bool:
    counts = np.bincount(labels, minlength=classes)
    return bool(counts.max() >= IMBALANCED * counts.min())


def long_tail(train: Arrays, ratio: float, classes: int, seed: int) -> Arrays:
    """The long-tailed subset of a balanced set: class k of K keeps n * ratio^(k / (K - 1)) images, at least one.

    The exponential profile of Cui et al. (arXiv:1901.05555) and Cao et al. (arXiv:1906.07413), rounded down as in the
    latter's code; n is the size of the smallest class, so that every class can follow it. A smaller ratio keeps a
    subset of what a larger one keeps. Raises UserError if the set is imbalanced already.
    """
    if ratio == 1:
        return train
    counts = np.bincount(train.labels, minlength=classes)
    sizes = f"{counts.min()} to {counts.max()} images"
    require(
        not is_imbalanced(train.labels, classes),
        f"--imbalance {ratio}: the classes differ in size already ({sizes}); leave it out",
    )
    kept = np.zeros(len(train.labels), bool)
    for label in range(classes):
        rows = np.random.default_rng([seed, label, 1]).permutation(np.flatnonzero(train.labels == label))
        kept[rows[: max(int(counts.min() * ratio ** (label / (classes - 1))), 1)]] = True
    return select(train, kept)


def keep_labels(train: Arrays, share: float, seed: int) -> Arrays:
    """The rows of this share of every class, at least one of each; a smaller share keeps a subset of a larger one's.

    Raises UserError for a split without labels (-1).
    """
    if share == 1:
        return train
    require(bool((train.labels >= 0).all()), f"--label-share {share}: the training images have no labels; leave it out")
    kept = np.zeros(len(train.labels), bool)
    for label in np.unique(train.labels):
        rows = np.random.default_rng([seed, int(label), 2]).permutation(np.flatnonzero(train.labels == label))
        kept[rows[: max(round(share * len(rows)), 1)]] = True
    return select(train, kept)
