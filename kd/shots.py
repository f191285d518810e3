"""How well classes with many, some and few training images are recognised."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

MANY, FEW = 100, 20  # more than this, and fewer than this: Liu et al., arXiv:1904.05160, section 4.1
NAMES = ("many", "medium", "few")


def class_recall(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> Float[Tensor, "k"]:
    """Percent of each class's samples that are recognised; NaN for a class without any."""
    size = torch.bincount(labels, minlength=logits.shape[1])
    right = torch.bincount(labels[logits.argmax(dim=1) == labels], minlength=logits.shape[1])
    return 100 * right.double() / size


def groups(counts: Int[Tensor, "k"]) -> dict[str, Int[Tensor, "m"]]:
    """The classes of each name, by their number of training images.

    By the paper's limits, which are made for its sets. Where they leave one of the three without a class, by rank: the
    largest third of the classes, the middle, the smallest third.
    """
    limits = {"many": counts > MANY, "medium": (counts >= FEW) & (counts <= MANY), "few": counts < FEW}
    found = {name: mask.nonzero().flatten() for name, mask in limits.items()}
    if all(len(classes) for classes in found.values()):
        return found
    ranked, third = counts.argsort(descending=True, stable=True), max(round(len(counts) / 3), 1)
    return dict(zip(NAMES, (ranked[:third], ranked[third:-third], ranked[-third:]), strict=True))


def shot_scores(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"], counts: Int[Tensor, "k"]) -> dict:
    """The summary's keys for a training set whose classes have these sizes.

    Accuracies in percent, in which each class of a group counts alike (None for a group without test images); `shots`
    says how many classes are in which group, and how large they are.
    """
    recall, parts = class_recall(logits, labels).cpu(), groups(counts)
    mean = lambda part: None if part.isnan().all() else part.nanmean().item()  # noqa: E731
    scores = {"test_balanced_top1": mean(recall)}
    scores |= {f"test_top1_{name}": mean(recall[classes]) for name, classes in parts.items()}
    return scores | {"shots": {name: _extent(counts[classes]) for name, classes in parts.items()}}


def _extent(counts: Int[Tensor, "m"]) -> dict[str, int]:
    """How many classes there are, and how many training images the smallest and the largest has."""
    smallest, largest = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    return {"classes": len(counts), "smallest": smallest, "largest": largest}
