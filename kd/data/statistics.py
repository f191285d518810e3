"""Hash of all pixels, and mean and standard deviation of the training split's channels, in one pass over blocks."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

BLOCK_BYTES = 2**25  # of pixels that are counted at a time


class Statistics(NamedTuple):
    """What normalisation and the run's identity depend on."""

    mean: tuple[float, ...]  # of the training split, per channel, as shares of 255
    std: tuple[float, ...]
    fingerprint: str  # of all splits and class names


class ChannelHistogram:
    """How often each channel has each of its 256 levels: exact integers, whatever the order of the images."""

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), np.int64)

    @classmethod
    def of(cls, counts: list[list[int]], pixels: int) -> "ChannelHistogram":
        """Of kept counts of this many pixels. Raises ValueError if they are not such."""
        histogram = cls()
        kept = np.array(counts)
        if kept.shape != histogram.counts.shape or kept.dtype != np.int64 or kept.min() < 0:
            raise ValueError("no counts of levels")
        if (kept.sum(axis=1) != pixels).any():
            raise ValueError(f"counts of other than {pixels} pixels")
        histogram.counts = kept
        return histogram

    def add(self, images: np.ndarray) -> None:
        """Count uint8 images b x 3 x h x w."""
        for channel, counts in enumerate(self.counts):
            counts += np.bincount(images[:, channel].ravel(), minlength=256)

    def mean_and_deviation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, as shares of 255."""
        levels = np.arange(256)
        means, deviations = [], []
        for counts in self.counts:
            mean = (counts * levels).sum() / counts.sum()
            deviation = ((counts * (levels - mean) ** 2).sum() / counts.sum()) ** 0.5
            means.append(float(mean / 255))
            deviations.append(float(max(deviation, 1) / 255))  # normalising a constant channel stays finite
        return tuple(means), tuple(deviations)


def iter_blocks(images: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """These rows of images (n x 3 x h x w), a block of bounded size at a time: counting takes eight bytes a pixel."""
    step = max(BLOCK_BYTES // images[:1].nbytes, 1)
    return (images[rows[start : start + step]] for start in range(0, len(rows), step))


def count_levels(blocks: Iterable[np.ndarray]) -> ChannelHistogram:
    histogram = ChannelHistogram()
    for images in blocks:
        histogram.add(images)
    return histogram


def channel_statistics(blocks: Iterable[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel as shares of 255, from exact integer counts."""
    return count_levels(blocks).mean_and_deviation()


class DatasetHash:
    """The sha256 of splits and class names. Feed the splits in the order of their names, images before labels."""

    def __init__(self, splits: Iterable[str], classes: Iterable[str]):
        self._sha256 = hashlib.sha256(json.dumps([sorted(splits), list(classes)]).encode())

    def begin(self, shape: tuple[int, ...]) -> None:
        """Begin a split whose images have this shape (N x 3 x H x W)."""
        self._sha256.update(str(shape).encode())

    def update(self, block: np.ndarray) -> None:
        self._sha256.update(block)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()
