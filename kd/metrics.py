"""How good predictions are: accuracy, likelihood, calibration, agreement, and accuracy on rare classes.

A network predicts the class with the largest logit, the first of equals. Every measure here, training's accuracy, the
report and kd.predict rank classes by that rule, so that no two of them can contradict each other.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

BINS = 15  # of confidence; Guo et al., arXiv:1706.04599, section 4
MANY, FEW = 100, 20  # training images: more than MANY, fewer than FEW; Liu et al., arXiv:1904.05160, section 4.1
SHOT_NAMES = ("many", "medium", "few")


def predicted(logits: Float[Tensor, "n k"]) -> Int[Tensor, "n"]:
    """The predicted class of each sample: the largest logit, the first of equals."""
    return logits.argmax(dim=1)


def ranked(logits: Float[Tensor, "n k"]) -> Int[Tensor, "n k"]:
    """Each sample's classes by falling logit, equals in their order; the first is `predicted`.

    torch.topk would return equals in any order.
    """
    return logits.argsort(dim=1, descending=True, stable=True)


def top_k(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"], k: int) -> float:
    """Percent of samples whose label is among the first k `ranked` classes."""
    best = predicted(logits)[:, None] if k == 1 else ranked(logits)[:, :k]
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()


def nll(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> float:
    """Mean negative log-likelihood in nats."""
    return F.cross_entropy(logits.double(), labels).item()


def by_confidence(
    logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], Int[Tensor, "n"]]:
    """Each sample's confidence, correctness (1 or 0), and bin among BINS equal ones: (0, 1/15], ..., (14/15, 1]."""
    confidence = logits.double().softmax(dim=1).amax(dim=1)
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.double, device=logits.device)
    bins = (torch.bucketize(confidence, edges) - 1).clamp(0, BINS - 1)
    return confidence, (predicted(logits) == labels).double(), bins


def ece(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> float:
    """Expected calibration error in percent: |accuracy - confidence|, averaged over equal bins of confidence with the
    bins' numbers of samples as weights (Guo et al., arXiv:1706.04599, section 2)."""
    confidence, correct, bins = by_confidence(logits, labels)
    gaps = torch.zeros(BINS, dtype=torch.double, device=logits.device).index_add(0, bins, correct - confidence)
    return 100 * gaps.abs().sum().item() / len(labels)


def agreement(logits: Float[Tensor, "n k"], others: Float[Tensor, "n k"]) -> float:
    """Percent of samples on which two networks predict the same class."""
    return 100 * (predicted(logits) == predicted(others)).double().mean().item()


@torch.no_grad()
def closeness(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, "b"] | None,
    soft_labels: Float[Tensor, "b k"] | None,
) -> dict[str, Tensor]:
    """How close student and teacher are on one batch: means over the batch, left on the device.

    agreement and, with labels, teacher_top1 in percent (of mixed images: by the hard label), kl = KL(teacher ||
    student) and teacher_entropy in nats at temperature 1, soft_entropy of the labels as the method softens them.
    """
    log_student, log_teacher = student_logits.log_softmax(dim=1), teacher_logits.log_softmax(dim=1)
    teacher_predicted = predicted(teacher_logits)
    measures = {
        "agreement": 100 * (predicted(student_logits) == teacher_predicted).float().mean(),
        "kl": F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True),
    }
    if labels is not None:
        measures["teacher_top1"] = 100 * (teacher_predicted == labels).float().mean()
    measures["teacher_entropy"] = _entropy(log_teacher)
    if soft_labels is not None:
        measures["soft_entropy"] = _entropy(soft_labels.log_softmax(dim=1))
    return measures


def _entropy(log_probabilities: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    return -(log_probabilities.exp() * log_probabilities).sum(dim=1).mean()


def class_recall(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> Float[Tensor, "k"]:
    """Percent of each class's samples that are classified correctly; NaN for a class without samples."""
    size = torch.bincount(labels, minlength=logits.shape[1])
    correct = torch.bincount(labels[predicted(logits) == labels], minlength=logits.shape[1])
    return 100 * correct.double() / size


def shot_groups(counts: Int[Tensor, "k"]) -> dict[str, Int[Tensor, "m"]]:
    """Group name -> its classes, by their number of training images `counts`.

    Uses the paper's limits, chosen for its data sets. If they leave a group empty, the classes are split by rank into
    the largest, middle and smallest third.
    """
    limits = {"many": counts > MANY, "medium": (counts >= FEW) & (counts <= MANY), "few": counts < FEW}
    groups = {name: mask.nonzero().flatten() for name, mask in limits.items()}
    if all(len(classes) for classes in groups.values()):
        return groups
    ranked, third = counts.argsort(descending=True, stable=True), max(round(len(counts) / 3), 1)
    return dict(zip(SHOT_NAMES, (ranked[:third], ranked[third:-third], ranked[-third:]), strict=True))


def rare_class_scores(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"], counts: Int[Tensor, "k"]) -> dict:
    """summary.json's keys for a training set whose classes have `counts` images.

    Accuracies in percent, averaged over the classes of a group with equal weights (None for a group without test
    images). `shots` gives each group's number of classes and their sizes.
    """
    recall, groups = class_recall(logits, labels).cpu(), shot_groups(counts)
    mean = lambda values: None if values.isnan().all() else values.nanmean().item()  # noqa: E731
    scores = {"test_balanced_top1": mean(recall)}
    scores |= {f"test_top1_{name}": mean(recall[classes]) for name, classes in groups.items()}
    return scores | {"shots": {name: _extent(counts[classes]) for name, classes in groups.items()}}


def _extent(counts: Int[Tensor, "m"]) -> dict[str, int]:
    """Number of classes, and training images of the smallest and the largest."""
    smallest, largest = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    return {"classes": len(counts), "smallest": smallest, "largest": largest}
