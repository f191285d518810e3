"""Whether two networks differ by more than the noise of their seeds and of the test images."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from scipy.special import ndtri, stdtrit  # quantiles of the normal and Student's t; scipy.stats is slower to import
from torch import Tensor

from kd.errors import UserError, require
from kd.runs.results import read_correct

ERROR = 0.05  # of a verdict; an interval covers 1 - ERROR


class Result(NamedTuple):
    """A finished run."""

    path: Path
    summary: dict


@dataclass(frozen=True)
class Difference:
    """Mean difference in test accuracy between runs paired by seed, in points; its variance in two parts."""

    seeds: list[int]
    mean: float
    of_seeds: float | None  # variance from training; None if unknown: one seed, or no seed that differs
    of_images: float  # variance from the choice of test images
    by_image: bool = True  # of_images is from both runs' saved logits; False: a bound from the accuracies

    def half(self, error: float = ERROR) -> float:
        """Half the width of the interval that covers 1 - error; of the images' noise alone if the seeds' is unknown.

        sqrt(t² of_seeds + z² of_images), t with one degree of freedom less than seeds. It covers at least 1 - error
        whatever the ratio of the two variances (Banerjee, Sankhya 22, 1960, 357-358), since the distribution function
        of χ² with one degree of freedom is concave. Satterthwaite's approximation has no such bound, and two seeds
        that happen to agree make its degrees of freedom too many.
        """
        wide = float(ndtri(1 - error / 2)) ** 2 * self.of_images
        if self.of_seeds is not None:
            wide += float(stdtrit(len(self.seeds) - 1, 1 - error / 2)) ** 2 * self.of_seeds
        return math.sqrt(wide)

    @property
    def interval(self) -> str:
        """Empty if the seeds' noise is unknown."""
        return "" if self.of_seeds is None else f"{self.mean - self.half():+.2f} to {self.mean + self.half():+.2f}"

    @property
    def p(self) -> float:
        """The error at which the interval ends at 0; if the seeds' noise is unknown, by the images' noise alone."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self.half(middle) < abs(self.mean) else (middle, high)
        return high

    def verdict(self, corrected: float | None = None, comparisons: int = 1) -> str:
        """In words, by the p-value as corrected for so many comparisons.

        "helped" and "hurt" are said of a method, so they need two seeds whose noise is known.
        """
        p = self.p
        corrected = p if corrected is None else corrected
        beyond = corrected < ERROR
        if p < ERROR and not beyond:
            found = f"no verdict: p {format_p(p, '= ')} alone is {format_p(corrected)} among {comparisons} comparisons"
        elif self.of_seeds is None:
            found = f"{'beyond' if beyond else 'within'} the test images' noise of ±{self.half():.2f}"
        elif beyond:
            found = f"{'helped' if self.mean > 0 else 'hurt'}, beyond the noise of seeds and test images"
        else:
            found = "smaller than the noise of seeds and test images"
        if self.of_seeds is not None:
            return found
        if len(self.seeds) == 1:
            return f"one seed says nothing about the seeds' noise; {found}"
        return f"every seed differs by the same, which hides the seeds' noise; {found}"


def format_p(p: float, sign: str = "") -> str:
    """`sign`: what stands between "p" and the number in a sentence, unless the number begins with one."""
    return f"{sign}{p:.3f}" if p >= 0.001 else "<0.001"


def holm(p_values: list[float]) -> list[float]:
    """The p-values corrected for their number (Holm, Scand. J. Stat. 6, 1979, 65-70): a false verdict among all of
    them is as rare as it would be for a single one, however they depend on each other."""
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


class Answers:
    """Which test images each run classified correctly, read once; `notes` says what could not be read."""

    def __init__(self):
        self.notes: list[str] = []
        self._correct: dict[Path, Tensor | None] = {}
        self._labels = ""  # their sha256

    def correct(self, result: Result) -> Bool[Tensor, "n"] | None:
        """None if the run's logits are missing, malformed, or of other images than those read before."""
        if result.path not in self._correct:
            try:
                self._correct[result.path] = self._read(result)
            except UserError as error:
                self._correct[result.path] = None
                self.notes.append(str(error))
        return self._correct[result.path]

    def _read(self, result: Result) -> Bool[Tensor, "n"]:
        correct, labels = read_correct(result.path, result.summary)
        known = self._labels or labels
        require(known == labels, f"{result.path}: its test labels are not those of the other runs")
        self._labels = known
        return correct


def compare(method: Iterable[Result], control: Iterable[Result], answers: Answers) -> Difference | None:
    """Test accuracy of `method` minus `control`, over the seeds that both have; None if they share none.

    If a seed has several runs, their mean counts.
    """
    ours, theirs = _by_seed(method), _by_seed(control)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    pairs = [(_top1(ours[seed]), _top1(theirs[seed])) for seed in seeds]
    gains = [one - other for one, other in pairs]
    rows = [_shares(results, answers) for seed in seeds for results in (ours[seed], theirs[seed])]
    if all(row is not None for row in rows):
        variances = variances_by_image(torch.stack(rows[::2]) - torch.stack(rows[1::2]))
    else:
        images = min(results[0].summary["test_images"] for side in (ours, theirs) for results in side.values())
        variances = variances_by_accuracy(pairs, images)
    return Difference(seeds, math.fsum(gains) / len(gains), *variances, by_image=None not in rows)


def _by_seed(results: Iterable[Result]) -> dict[int, list[Result]]:
    by_seed: dict[int, list[Result]] = {}
    for result in results:
        if result.summary["test_top1"] is not None:
            by_seed.setdefault(result.summary["seed"], []).append(result)
    return by_seed


def _top1(results: list[Result]) -> float:
    return math.fsum(float(result.summary["test_top1"]) for result in results) / len(results)


def _shares(results: list[Result], answers: Answers) -> Float[Tensor, "n"] | None:
    """For each test image, the share of these runs that classified it correctly."""
    rows = [answers.correct(result) for result in results]
    return None if any(row is None for row in rows) else torch.stack(rows).double().mean(dim=0)


def variances_by_image(gains: Float[Tensor, "s n"]) -> tuple[float | None, float]:
    """Variance of the mean of `gains` from seeds and from images, in squared points.

    A gain is 1, 0 or -1 for each seed and image: mean + seed + image + rest, all but the mean random and independent,
    as with readers and cases in radiology (Obuchowski and Rockette, Commun. Stat. Simul. Comput. 24, 1995, 285-308).
    The spread of the seeds' means holds seed and rest, but not what an image does to all seeds alike; that is what the
    images' part adds, their spread less the rest's share in it, so that nothing counts twice. The seeds' spread is
    never taken for less than the rest explains: two seeds that agree by chance are no certainty.
    Two images more, one won and one lost, keep few differing images from looking sure (Bonett and Price, J. Educ.
    Behav. Stat. 37, 2012, 479-488).
    """
    seeds, images = gains.shape
    by_seed, by_image, mean = gains.mean(dim=1), gains.mean(dim=0), gains.mean()
    spread, extra = _variance(by_image - mean, images - 1), 2 / images**2
    if seeds == 1:
        return None, 100**2 * (spread / images + extra)
    rest = _variance(gains - by_seed[:, None] - by_image + mean, (seeds - 1) * (images - 1))
    of_seeds = max(_variance(by_seed - mean, seeds - 1), rest / images) / seeds
    of_images = max(spread - rest / seeds, 0.0) / images + extra
    return _known(100**2 * of_seeds), 100**2 * of_images


def _variance(centred: Tensor, freedom: int) -> float:
    return (centred**2).sum().item() / max(freedom, 1)


def variances_by_accuracy(pairs: list[tuple[float, float]], images: int) -> tuple[float | None, float]:
    """As `variances_by_image`, from each seed's two accuracies in percent alone.

    The images' part is that of one pair of networks on two independent test sets, which is more than the truth as both
    saw the same images. Two images more for each network, one right and one wrong, keep accuracies near 100 from
    looking sure (Agresti and Caffo, Am. Stat. 54, 2000, 280-288).
    """
    means = [math.fsum(side) / len(side) for side in zip(*pairs, strict=True)]
    shares = [(mean / 100 * images + 1) / (images + 2) for mean in means]
    of_images = 100**2 * sum(share * (1 - share) for share in shares) / (images + 2)
    if len(pairs) == 1:
        return None, of_images
    gains = torch.tensor([one - other for one, other in pairs], dtype=torch.double)
    return _known(_variance(gains - gains.mean(), len(pairs) - 1) / len(pairs)), of_images


def _known(variance: float) -> float | None:
    """None for no variance at all, rounding errors aside: seeds that all differ by the same hide their noise."""
    return variance if variance > 1e-12 else None
