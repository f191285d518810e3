"""The order in which an epoch of a stream visits its rows, and how well that mixes the classes."""

import numpy as np
import torch
from jaxtyping import Int

from kd import views

FEW = 0.7  # of the classes that a shuffled window would hold; below that, batches differ too much in theirs


def stream_order(shards: Int[np.ndarray, "n"], window: int, seed: int, epoch: int) -> Int[np.ndarray, "n"]:
    """The order in which an epoch visits n rows that lie in these `shards`: shards shuffled, then windows of rows.

    With a window of n or more it is kd.views.order, that of data in memory.
    """
    count = int(shards.max()) + 1
    place = np.empty(count, np.int64)
    place[views.order(seed, epoch, count).numpy()] = np.arange(count)
    sequence = np.argsort(place[shards], kind="stable")
    bits = views.random_bits(torch.from_numpy(sequence), seed, "order", epoch).numpy()
    return sequence[np.lexsort((sequence, bits, np.arange(len(shards)) // window))]


def few_classes(labels: Int[np.ndarray, "n"], window: int) -> str:
    """What to do about windows that hold few of the classes, in words; nothing where they hold about as many as rows
    drawn at random would. `labels` are in the order of an epoch."""
    shares = np.bincount(labels) / len(labels)
    windows = [labels[start : start + window] for start in range(0, len(labels) - window + 1, window)]
    if not windows:
        return ""
    found, by_chance = np.mean([len(np.unique(part)) for part in windows]), (1 - (1 - shares) ** window).sum()
    if found >= FEW * by_chance:
        return ""
    return (
        f"{window} rows in turn hold {found:.3g} classes, shuffled ones would hold {by_chance:.3g}: the data is sorted"
        " by class; give a larger --shuffle-rows, or store it shuffled"
    )
