"""How good a network's predictions are, and the sums that training keeps on the device."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

BINS = 15  # of confidence: Guo et al., arXiv:1706.04599, section 4


def top_k(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"], k: int) -> float:
    """Percent of samples whose label is among the k largest logits."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()


def nll(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> float:
    """Mean negative log-likelihood in nats."""
    return F.cross_entropy(logits.double(), labels).item()


def by_confidence(
    logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], Int[Tensor, "n"]]:
    """Of each sample: its confidence, whether it is right (1 or 0), and which of the BINS equal bins it is in.

    Bins are open on the left: (0, 1/15], ..., (14/15, 1]."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.double, device=logits.device)
    return confidence, (predicted == labels).double(), (torch.bucketize(confidence, edges) - 1).clamp(0, BINS - 1)


def ece(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> float:
    """Expected calibration error in percent: |accuracy - confidence| over equal bins of confidence, weighted by their
    samples (Guo et al., arXiv:1706.04599, section 2)."""
    confidence, right, bin_of = by_confidence(logits, labels)
    gaps = torch.zeros(BINS, dtype=torch.double, device=logits.device).index_add(0, bin_of, right - confidence)
    return 100 * gaps.abs().sum().item() / len(labels)


def agreement(logits: Float[Tensor, "n k"], others: Float[Tensor, "n k"]) -> float:
    """Percent of samples on which two networks predict the same class."""
    return 100 * (logits.argmax(dim=1) == others.argmax(dim=1)).double().mean().item()


@torch.no_grad()
def closeness(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, "b"],
    soft_labels: Float[Tensor, "b k"] | None,
) -> dict[str, Tensor]:
    """Of one batch of training views, each averaged over it and left on the device.

    agreement and teacher_top1 in percent (of mixed images: with the harder label), kl = KL(teacher || student) and
    teacher_entropy in nats at temperature 1; soft_entropy is that of the labels as the method softens them.
    """
    log_student, log_teacher = student_logits.log_softmax(dim=1), teacher_logits.log_softmax(dim=1)
    answers = teacher_logits.argmax(dim=1)
    measures = {
        "agreement": 100 * (student_logits.argmax(dim=1) == answers).float().mean(),
        "kl": F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True),
        "teacher_top1": 100 * (answers == labels).float().mean(),
        "teacher_entropy": _entropy(log_teacher),
    }
    if soft_labels is not None:
        measures["soft_entropy"] = _entropy(soft_labels.log_softmax(dim=1))
    return measures


def _entropy(log_probabilities: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    return -(log_probabilities.exp() * log_probabilities).sum(dim=1).mean()


#: (kd.shots) How well classes with many, some and few training images are recognised.


MANY, FEW = 100, 20  # more than this, and fewer than this: Liu et al., arXiv:1904.05160, section 4.1


SHOT_NAMES = ("many", "medium", "few")


def class_recall(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> Float[Tensor, "k"]:
    """Percent of each class's samples that are recognised; NaN for a class without any."""
    size = torch.bincount(labels, minlength=logits.shape[1])
    right = torch.bincount(labels[logits.argmax(dim=1) == labels], minlength=logits.shape[1])
    return 100 * right.double() / size


def shot_groups(counts: Int[Tensor, "k"]) -> dict[str, Int[Tensor, "m"]]:
    """The classes of each name, by their number of training images.

    By the paper's limits, which are made for its sets. Where they leave one of the three without a class, by rank: the
    largest third of the classes, the middle, the smallest third.
    """
    limits = {"many": counts > MANY, "medium": (counts >= FEW) & (counts <= MANY), "few": counts < FEW}
    found = {name: mask.nonzero().flatten() for name, mask in limits.items()}
    if all(len(classes) for classes in found.values()):
        return found
    ranked, third = counts.argsort(descending=True, stable=True), max(round(len(counts) / 3), 1)
    return dict(zip(SHOT_NAMES, (ranked[:third], ranked[third:-third], ranked[-third:]), strict=True))


def rare_class_scores(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"], counts: Int[Tensor, "k"]) -> dict:
    """The summary's keys for a training set whose classes have these sizes.

    Accuracies in percent, in which each class of a group counts alike (None for a group without test images); `shots`
    says how many classes are in which group, and how large they are.
    """
    recall, parts = class_recall(logits, labels).cpu(), shot_groups(counts)
    mean = lambda part: None if part.isnan().all() else part.nanmean().item()  # noqa: E731
    scores = {"test_balanced_top1": mean(recall)}
    scores |= {f"test_top1_{name}": mean(recall[classes]) for name, classes in parts.items()}
    return scores | {"shots": {name: _extent(counts[classes]) for name, classes in parts.items()}}


def _extent(counts: Int[Tensor, "m"]) -> dict[str, int]:
    """How many classes there are, and how many training images the smallest and the largest has."""
    smallest, largest = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    return {"classes": len(counts), "smallest": smallest, "largest": largest}


def images_noise(top1: float, other: float, images: int) -> float:
    """Half the 95% interval that a test set of so many images leaves around a difference of two accuracies (percent).

    As of two independent samples; both networks see the same images, so this is on the careful side.
    """
    shares = (top1 / 100, other / 100)
    return 1.96 * 100 * math.sqrt(sum(share * (1 - share) for share in shares) / images)
