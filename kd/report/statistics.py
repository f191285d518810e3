"""Means and deviations over seeds, and whether a difference between two networks exceeds the seeds' noise."""

import math
from typing import NamedTuple

from scipy.special import stdtrit  # Student's t quantile; scipy.stats calls the same and is slower to import

CONFIDENCE = 0.95


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation (n - 1), which is None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def cell(values: list[float], style: str, seeds: int, empty: str = "") -> str:
    """Mean ± sample standard deviation, followed by the number of values if it is not `seeds`, the row's number."""
    if not values:
        return empty
    mean, deviation = mean_and_deviation(values)
    shown = f"{mean:{style}}" if deviation is None else f"{mean:{style}} ± {deviation:{style}}"
    return shown if len(values) == seeds else f"{shown} ({len(values)})"


class Difference(NamedTuple):
    """Mean difference between runs paired by seed, in points of accuracy."""

    seeds: list[int]
    mean: float
    half: float | None  # half the width of the t interval over seeds; None for one seed
    words: str  # the verdict

    @property
    def interval(self) -> str:
        return "" if self.half is None else f"{self.mean - self.half:+.2f} to {self.mean + self.half:+.2f}"


def paired(gains: dict[int, float], noise: float) -> Difference:
    """The mean of `gains` (seed -> difference) with its interval and a verdict.

    `noise` is the test set's own (images_noise), the only yardstick if there is a single seed.
    """
    seeds = sorted(gains)
    mean, deviation = mean_and_deviation([gains[seed] for seed in seeds])
    direction = "helped" if mean > 0 else "hurt"
    compared = f"{'within' if abs(mean) <= noise else 'beyond'} the test set's own noise of ±{noise:.2f}"
    if deviation is None:
        words = f"one seed says nothing about the seeds' noise; {compared}"
        return Difference(seeds, mean, None, words)
    quantile = float(stdtrit(len(seeds) - 1, (1 + CONFIDENCE) / 2))
    half = quantile * deviation / math.sqrt(len(seeds))
    if mean - half <= 0 <= mean + half:
        return Difference(seeds, mean, half, "smaller than the seeds' noise")
    if deviation < 1e-9:
        words = f"every seed differs by the same, which hides the seeds' noise; {compared}"
        return Difference(seeds, mean, half, words)
    return Difference(seeds, mean, half, f"{direction}, beyond the seeds' noise")
