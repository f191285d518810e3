"""How much an embedding tells of labels: accuracy of nearest neighbours and of a linear classifier on frozen features.

Pure functions of features; kd/training/probe.py computes those.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd.utils import rng
from kd.utils.floats import widest

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO (arXiv:2104.14294, section 4.1, and its eval_knn.py)

SIMILARITIES = 2**25  # that are in memory at a time: 128 MiB

HELD_OUT = 0.2  # share of each class's training rows on which the L2 penalty is chosen

PENALTIES = (
    1.0,
    1e-1,
    1e-2,
    1e-3,
    1e-4,
    1e-5,
)  # L2, beside the mean cross-entropy; each starts where the last one ended

ITERATIONS = 200  # of L-BFGS, for each penalty

Told = Callable[[str, int, int], None]  # told what is being done, how much of it is done, and how much there is


def silent(what: str, done: int, total: int) -> None:
    """A `Told` that tells nobody."""


def knn_accuracy(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, "n"],
    test_features: Float[Tensor, "m d"],
    test_labels: Int[Tensor, "m"],
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    told: Told = silent,
) -> float:
    """Percent of test rows whose class the `k` most similar rows vote for, each with exp(similarity / temperature).

    Similarity is the cosine. `k` is at most n. Of classes with equal votes the first wins. Weighted votes as in Wu et
    al. (arXiv:1805.01978, section 3.4); k and temperature as in DINO.
    """
    k, classes = min(k, len(features)), int(torch.maximum(labels.max(), test_labels.max())) + 1
    known, right = F.normalize(features.float(), dim=1).T.contiguous(), 0
    rows = max(SIMILARITIES // len(features), 1)
    for start in range(0, len(test_features), rows):
        part = F.normalize(test_features[start : start + rows].float(), dim=1)
        similarity, nearest = (part @ known).topk(k, dim=1)
        # Divided by the largest vote, which changes no winner and overflows at no temperature.
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        counted = torch.zeros(len(part), classes, device=part.device).scatter_add_(1, labels[nearest], votes)
        right += int((counted.argmax(dim=1) == test_labels[start : start + rows]).sum())
        told("kNN", min(start + rows, len(test_features)), len(test_features))
    return 100 * right / len(test_labels)


def linear_probe_accuracy(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, "n"],
    test_features: Float[Tensor, "m d"],
    test_labels: Int[Tensor, "m"],
    seed: int = 0,
    told: Told = silent,
) -> float:
    """Percent of test rows that logistic regression on the standardised features classifies correctly.

    The L2 penalty is the best one of PENALTIES on HELD_OUT of each class (of equals, by cross-entropy); the classifier
    is then fitted to all n rows. A function of its arguments: `seed` draws the rows that are held out.
    """
    held = held_out(labels, seed)
    penalty = PENALTIES[len(PENALTIES) // 2]
    total = len(PENALTIES) + 1
    if held.any() and not held.all():
        penalty = choose_penalty(features, labels, held, lambda done: told("linear probe", done, total))
    scale = Standardise(features)
    weights = fit_logistic(scale(features), labels, penalty, int(labels.max()) + 1)
    told("linear probe", total, total)
    logits = _logits(scale(test_features), weights)
    return 100 * int((logits.argmax(dim=1) == test_labels).sum()) / len(test_labels)


def held_out(labels: Int[Tensor, "n"], seed: int) -> Bool[Tensor, "n"]:
    """HELD_OUT of each class's rows, at random; at least one of a class with two, and never all of it."""
    bits = rng.random_bits(torch.arange(len(labels)), seed, "probe").to(labels.device)
    order = torch.argsort((labels << 32) | bits)
    sizes = torch.bincount(labels)
    counts = torch.minimum((HELD_OUT * sizes).round().long().clamp(min=1), (sizes - 1).clamp(min=0))
    place = torch.arange(len(labels), device=labels.device) - (sizes.cumsum(0) - sizes)[labels[order]]
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    held[order] = place < counts[labels[order]]
    return held


def choose_penalty(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, "n"],
    held: Bool[Tensor, "n"],
    told: Callable[[int], None] = lambda done: None,
) -> float:
    """The one of PENALTIES with the best accuracy on the rows `held`, fitted to the others; of equals, by loss."""
    kept, wanted, classes = features[~held], labels[held], int(labels.max()) + 1
    scale = Standardise(kept)
    ours, theirs = scale(kept), scale(features[held])
    scores, weights = {}, None
    for number, penalty in enumerate(PENALTIES, start=1):
        weights = fit_logistic(ours, labels[~held], penalty, classes, weights)
        logits = _logits(theirs, weights)
        right = int((logits.argmax(dim=1) == wanted).sum())
        scores[penalty] = (right, -F.cross_entropy(logits, wanted).item())
        told(number)
    return max(scores, key=scores.__getitem__)


class Standardise:
    """Subtracts the mean of the features that it was made of and divides by their deviation, in the widest floats."""

    def __init__(self, features: Float[Tensor, "n d"]):
        self.dtype = widest(features.device)
        total, squares = 0.0, 0.0
        for part in features.split(_block(features)):
            total = total + part.to(self.dtype).sum(dim=0)
        self.mean = total / len(features)
        for part in features.split(_block(features)):
            squares = squares + ((part.to(self.dtype) - self.mean) ** 2).sum(dim=0)
        deviation = (squares / len(features)).sqrt()
        self.deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))  # a constant one stays 0

    def __call__(self, features: Float[Tensor, "m d"]) -> "Blocks":
        return Blocks(features, self)


class Blocks:
    """Standardised features a block at a time, so that no second copy of them all is needed."""

    def __init__(self, features: Float[Tensor, "n d"], scale: Standardise):
        self.features, self.scale = features, scale
        self.rows = _block(features)

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[Float[Tensor, "b d"]]:
        for part in self.features.split(self.rows):
            yield (part.to(self.scale.dtype) - self.scale.mean) / self.scale.deviation


def _block(features: Tensor) -> int:
    """Rows that are computed at a time: 32 MiB of float64."""
    return max(2**22 // features.shape[1], 1)


def fit_logistic(
    features: Blocks,
    labels: Int[Tensor, "n"],
    penalty: float,
    classes: int,
    start: Float[Tensor, "k e"] | None = None,
) -> Float[Tensor, "k e"]:
    """The weights, k x (d + 1) with the bias last, that minimise mean cross-entropy + penalty / 2 * |weights|^2.

    By L-BFGS with all rows in every step. The bias has no penalty, as in scikit-learn, whose C is 1 / (n * penalty).
    """
    width, dtype, device = features.features.shape[1], features.scale.dtype, labels.device
    weights = torch.zeros(classes, width + 1, dtype=dtype, device=device) if start is None else start.clone()
    targets = labels.split(features.rows)
    options = {"max_iter": ITERATIONS, "history_size": 10, "line_search_fn": "strong_wolfe"}
    small = 1e-7 if dtype == torch.float64 else 1e-5
    lbfgs = torch.optim.LBFGS([weights], **options, tolerance_grad=small, tolerance_change=1e-10)

    def closure() -> Tensor:
        loss, gradient = penalty / 2 * (weights[:, :-1] ** 2).sum(), torch.zeros_like(weights)
        for part, target in zip(features, targets, strict=True):
            log_p = F.log_softmax(part @ weights[:, :-1].T + weights[:, -1], dim=1)
            loss = loss - log_p.gather(1, target[:, None]).sum() / len(labels)
            error = log_p.exp()
            error[torch.arange(len(target), device=device), target] -= 1
            gradient[:, :-1] += error.T @ part / len(labels)
            gradient[:, -1] += error.sum(dim=0) / len(labels)
        gradient[:, :-1] += penalty * weights[:, :-1]
        weights.grad = gradient
        return loss

    lbfgs.step(closure)
    return weights


def _logits(features: Blocks, weights: Float[Tensor, "k e"]) -> Float[Tensor, "m k"]:
    return torch.cat([part @ weights[:, :-1].T + weights[:, -1] for part in features])


def probe_bytes(rows: int, test_rows: int, width: int) -> int:
    """Memory that both scores take at most: the features, two copies of them, and the similarities, sorted."""
    return 3 * 4 * (rows + test_rows) * width + 2 * 4 * min(rows * test_rows, SIMILARITIES)
