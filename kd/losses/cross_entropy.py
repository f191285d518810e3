"""Cross-entropy for classes that differ in size. What a method asks of its teacher stays as it is."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.types import Batch

BETA = 0.9999  # of the effective number; the authors' usual value, close to inverse frequency below 1,000 images


def cross_entropy(
    logits: Float[Tensor, "b k"],
    batch: Batch,
    label_smoothing: float = 0.0,
    weights: Float[Tensor, "k"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy with the label; of a mixed image with both of its labels, each by its share (arXiv:1710.09412).

    `weights` multiply each label's part. The mean is over the batch, not over the weights in it, so that processes
    which average their gradients compute what one would.
    """
    if batch.mix is None and weights is None:
        return F.cross_entropy(logits, batch.label, label_smoothing=label_smoothing)

    def towards(label: Int[Tensor, "b"]) -> Float[Tensor, "b"]:
        each = F.cross_entropy(logits, label, label_smoothing=label_smoothing, reduction="none")
        return each if weights is None else weights[label] * each

    if batch.mix is None:
        return towards(batch.label).mean()
    return (batch.mix.weight * towards(batch.label) + (1 - batch.mix.weight) * towards(batch.mix.label)).mean()


def class_weights(counts: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
    """(1 - beta) / (1 - beta^n): the inverse of each class's effective number (Cui et al., arXiv:1901.05555).

    Differs from the paper: scaled to a mean of 1 over the training images instead of a sum of K over the classes, so
    that the loss keeps its size beside a distillation term, as F.cross_entropy's own weights do.
    """
    counts = counts.clamp(min=1).double()
    weights = (1 - BETA) / (1 - BETA**counts)
    return (weights * counts.sum() / (weights * counts).sum()).float()


def log_prior(counts: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
    """Logarithm of each class's share of the training images, which training adds to the logits and prediction does not
    (logit-adjusted loss with tau = 1, Menon et al., arXiv:2007.07314, section 4.2)."""
    counts = counts.clamp(min=1).double()
    return (counts / counts.sum()).log().float()


class BalancedCrossEntropy(nn.Module):
    """cross_entropy as --balance says, for training labels that have these sizes."""

    def __init__(self, balance: str, labels: Int[Tensor, "n"] | None, classes: int):
        super().__init__()
        counts = None if labels is None else torch.bincount(labels, minlength=classes)
        self.register_buffer("weights", class_weights(counts) if balance == "weights" else None, persistent=False)
        self.register_buffer("shift", log_prior(counts) if balance == "logit-adjust" else None, persistent=False)

    def forward(self, logits: Float[Tensor, "b k"], batch: Batch, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
        shifted = logits if self.shift is None else logits + self.shift
        return cross_entropy(shifted, batch, label_smoothing, self.weights)
