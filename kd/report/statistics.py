"""Means and deviations over seeds."""

import math


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
