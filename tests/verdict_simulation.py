"""How often two equal methods are called different, by simulated networks.

    python -m tests.verdict_simulation             # the tables of docs/measurements.md
    python -m tests.verdict_simulation --draws 100

A network is right about an image if mean + seed + image + rest exceeds 0, all normal; a part of the image's effect is
the same for all networks, another for all seeds of a method. So two networks agree more than chance, as real ones do.
The noise of seeds is a multiple of the noise that the test images add to the difference of one pair of networks.
"""

import argparse
import bisect
import itertools
import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from kd.runs.comparison import ERROR, Difference, holm, variances_by_accuracy, variances_by_image

SEEDS, IMAGES, RATIOS = (1, 2, 3, 5), (359, 1000, 10_000), (0.0, 0.5, 1.0, 2.0)
SHARES = (0.01, 0.05, 0.15, 0.5)  # of images on which one of two networks is right


class Networks(NamedTuple):
    """Their mean accuracy, and the shares of the variance that all networks, or a method's seeds, have in common."""

    accuracy: float
    shared: float
    of_method: float


NETWORKS = (
    Networks(0.25, 0.60, 0.10),
    Networks(0.70, 0.85, 0.05),
    Networks(0.70, 0.40, 0.40),  # each method has images of its own that it gets right
    Networks(0.70, 0.30, 0.65),
    Networks(0.95, 0.90, 0.02),
    Networks(0.99, 0.80, 0.10),
)


class Counts(NamedTuple):
    """Percent of the draws with a verdict."""

    by_image: float
    by_accuracy: float
    before: float  # by the rule that forgot the images


def draw(rng: np.random.Generator, kind: Networks, shape: tuple[int, int, int], deviation: float, gain: float = 0.0):
    """Whether each network is right, methods x seeds x images.

    `deviation` of a seed's effect and `gain` of the first method: on the latent scale, whose deviation is 1."""
    methods, seeds, images = shape
    normal = lambda *sizes: rng.standard_normal(sizes, dtype=np.float32)  # noqa: E731
    latent = math.sqrt(1 - kind.shared - kind.of_method) * normal(methods, seeds, images)
    latent += math.sqrt(kind.shared) * normal(1, 1, images) + math.sqrt(kind.of_method) * normal(methods, 1, images)
    latent[0] += gain
    return latent + deviation * normal(methods, seeds, 1) > -stats.norm.ppf(kind.accuracy)


@cache
def agreement(kind: Networks) -> float:
    """Share of images on which two methods' networks are both right or both wrong."""
    first, second = draw(np.random.default_rng(1), kind, (2, 1, 400_000), 0.0)[:, 0]
    return float((first == second).mean())


def seed_noise(kind: Networks, images: int, ratio: float) -> float:
    """Deviation of a seed's effect that makes the seeds' noise `ratio` times the images'."""
    points = ratio * math.sqrt((1 - agreement(kind)) / images / 2)
    return points / stats.norm.pdf(stats.norm.ppf(kind.accuracy))


def differences(method: np.ndarray, control: np.ndarray) -> tuple[Difference, Difference]:
    """As kd.runs.comparison.compare finds it with the test logits, and without them."""
    gains = torch.from_numpy(method.astype(np.float64) - control)
    pairs = [(100 * float(one.mean()), 100 * float(other.mean())) for one, other in zip(method, control, strict=True)]
    seeds, mean = list(range(len(pairs))), 100 * gains.mean().item()
    by_image = Difference(seeds, mean, *variances_by_image(gains))
    return by_image, Difference(seeds, mean, *variances_by_accuracy(pairs, gains.shape[1]), by_image=False)


def is_verdict(found: Difference) -> bool:
    return found.verdict().startswith(("helped", "hurt"))


def before(method: np.ndarray, control: np.ndarray) -> bool:
    """The rule of 2026-11-25: Student's t over seeds; for one seed, the binomial noise of two independent sets."""
    gains = method.mean(axis=1) - control.mean(axis=1)
    if len(gains) == 1:
        shares = (method.mean(), control.mean())
        return abs(gains[0]) > 1.96 * math.sqrt(sum(share * (1 - share) for share in shares) / method.shape[1])
    deviation = gains.std(ddof=1)
    return deviation > 1e-11 and abs(gains.mean()) > stats.t.ppf(0.975, len(gains) - 1) * deviation / len(gains) ** 0.5


def count(kind: Networks, seeds: int, images: int, ratio: float, draws: int) -> Counts:
    rng, deviation = np.random.default_rng([seeds, images, round(10 * ratio)]), seed_noise(kind, images, ratio)
    found = []
    for _ in range(draws):
        method, control = draw(rng, kind, (2, seeds, images), deviation)
        found.append([*map(is_verdict, differences(method, control)), before(method, control)])
    return Counts(*(100 * np.mean(found, axis=0)))


@cache
def least_lead(differing: int, images: int) -> int:
    """Of one seed: by how many images one network must lead to be called beyond the test images' noise, if the two
    differ on so many; differing + 1 if no lead is enough."""

    def is_beyond(wins: int) -> bool:
        gains = torch.zeros(1, images, dtype=torch.double)
        gains[0, :wins], gains[0, wins:differing] = 1, -1
        return Difference([0], 100 * gains.mean().item(), *variances_by_image(gains)).p < ERROR

    wins = bisect.bisect_left(range(differing + 1), True, lo=(differing + 1) // 2, key=is_beyond)
    return 2 * wins - differing if wins <= differing else differing + 1


def size_of_one_seed(images: int, share: float) -> float:
    """Exact percent of the pairs of equally good networks, which differ on `share` of all images, called beyond."""
    total = 0.0
    for differing in range(images + 1):
        if (chance := stats.binom.pmf(differing, images, share)) > 1e-9:
            lost = (differing - least_lead(differing, images)) // 2
            total += chance * 2 * stats.binom.cdf(lost, differing, 0.5)
    return 100 * total


def count_families(methods: int, seeds: int, images: int, ratio: float, draws: int) -> tuple[float, float]:
    """Percent of the draws in which any of `methods` has a verdict against one control: with Holm, and without."""
    kind = NETWORKS[1]
    rng, deviation = np.random.default_rng([methods, seeds, images]), seed_noise(kind, images, ratio)
    found = []
    for _ in range(draws):
        control, *others = draw(rng, kind, (methods + 1, seeds, images), deviation)
        p_values = [differences(method, control)[0].p for method in others]
        found.append((min(holm(p_values)) < ERROR, min(p_values) < ERROR))
    return tuple(100 * np.mean(found, axis=0))


def found_gains(seeds: int, images: int, times: float, draws: int) -> float:
    """Percent of the draws with a verdict; the true gain is `times` the images' noise, the seeds' noise half of it."""
    kind = NETWORKS[1]
    gain = times * math.sqrt((1 - agreement(kind)) / images) / stats.norm.pdf(stats.norm.ppf(kind.accuracy))
    rng, deviation = np.random.default_rng([seeds, images]), seed_noise(kind, images, 0.5)
    drawn = (draw(rng, kind, (2, seeds, images), deviation, gain) for _ in range(draws))
    return 100 * float(np.mean([is_verdict(differences(*pair)[0]) for pair in drawn]))


def print_table(head: tuple[str, ...], rows: list[tuple]) -> None:
    print("\n| " + " | ".join(head) + " |\n" + "|--:" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.1f}" for cell in row) + " |", flush=True)


def worst(seeds: int, images: int, draws: int) -> Counts:
    """The largest percentage of each rule over all NETWORKS and RATIOS."""
    each = [count(kind, seeds, images, ratio, draws) for kind, ratio in itertools.product(NETWORKS, RATIOS)]
    return Counts(*map(max, zip(*each, strict=True)))


def main(draws: int) -> None:
    kinds = ", ".join(f"{100 * kind.accuracy:.0f}% ({100 * agreement(kind):.0f}% alike)" for kind in NETWORKS)
    print(f"{draws} draws each; accuracies {kinds}; seeds' noise {', '.join(map(str, RATIOS))} times the images'.")
    print("\nNo true difference, the worst of all accuracies and ratios: percent with a verdict.")
    cells = itertools.product(SEEDS, IMAGES)
    rows = [(str(seeds), f"{images:,}", *worst(seeds, images, draws)) for seeds, images in cells]
    print_table(("seeds", "test images", "with logits", "without", "rule before"), rows)
    print("\nOne seed, equal networks: exact percent called beyond the test images' noise, by the share that differs.")
    rows = [(f"{images:,}", *(size_of_one_seed(images, share) for share in SHARES)) for images in IMAGES]
    print_table(("test images", *(f"{100 * share:.0f}% differ" for share in SHARES)), rows)
    print("\n16 equal methods against one control, seeds' noise as large as the images': percent with any verdict.")
    cells = [(seeds, images) for seeds in SEEDS[1:] for images in IMAGES[:2]]
    rows = [(str(s), f"{n:,}", *count_families(16, s, n, 1.0, draws // 2)) for s, n in cells]
    print_table(("seeds", "test images", "Holm", "not corrected"), rows)
    print("\nA true gain of 3 and of 6 times the images' noise, 1,000 images, seeds' noise half of it: percent found.")
    print_table(
        ("seeds", "3 times", "6 times"), [(str(s), *(found_gains(s, 1000, t, draws) for t in (3, 6))) for s in SEEDS]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    torch.set_num_threads(1)
    main(parser.parse_args().draws)
