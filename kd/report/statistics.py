"""What several seeds say: means, deviations, and whether a difference is more than their noise."""

import math
from typing import NamedTuple

CONFIDENCE = 0.95


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation (n - 1); None for the latter of a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def cell(values: list[float], style: str, seeds: int, empty: str = "") -> str:
    """Mean ± sample standard deviation, and of how many values where these are fewer than the row's seeds."""
    if not values:
        return empty
    mean, deviation = mean_and_deviation(values)
    shown = f"{mean:{style}}" if deviation is None else f"{mean:{style}} ± {deviation:{style}}"
    return shown if len(values) == seeds else f"{shown} ({len(values)})"


def t_within(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t: exact for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if freedom % 2 == 0:
        term = total = 1.0
        for k in range(1, freedom // 2):
            term *= square * (2 * k - 1) / (2 * k)
            total += term
        return sine * total
    term, total = math.cos(angle), 0.0
    for k in range(1, (freedom - 1) // 2 + 1):
        total += term
        term *= square * (2 * k) / (2 * k + 1)
    return 2 / math.pi * (angle + sine * total)


def t_quantile(share: float, freedom: int) -> float:
    """The t that |T| stays below with probability `share`."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < share:
        low, high = high, 2 * high
    for _ in range(100):  # halving, down to the last digits
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < share else (low, middle)
    return high


class Difference(NamedTuple):
    """Of paired runs, seed by seed, in points of accuracy."""

    seeds: list[int]
    mean: float
    half: float | None  # of the t interval over seeds; None for one seed
    words: str

    @property
    def interval(self) -> str:
        return "" if self.half is None else f"{self.mean - self.half:+.2f} to {self.mean + self.half:+.2f}"


def paired(gains: dict[int, float], noise: float) -> Difference:
    """What `gains` (seed -> difference) show; `noise` is the test set's own (images_noise), the measure of one seed."""
    seeds = sorted(gains)
    mean, deviation = mean_and_deviation([gains[seed] for seed in seeds])
    direction = "helped" if mean > 0 else "hurt"
    beside = f"{'within' if abs(mean) <= noise else 'beyond'} the test set's own noise of ±{noise:.2f}"
    if deviation is None:
        words = f"one seed says nothing about the seeds' noise; {beside}"
        return Difference(seeds, mean, None, words)
    half = t_quantile(CONFIDENCE, len(seeds) - 1) * deviation / math.sqrt(len(seeds))
    if mean - half <= 0 <= mean + half:
        return Difference(seeds, mean, half, "smaller than the seeds' noise")
    if deviation < 1e-9:
        words = f"every seed differs by the same, which hides the seeds' noise; {beside}"
        return Difference(seeds, mean, half, words)
    return Difference(seeds, mean, half, f"{direction}, beyond the seeds' noise")
