"""Cross-entropy with the labels: smoothed, mixed, or weighted for classes of different sizes (--balance)."""

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
    """Cross-entropy with the label; for a mixed image, with both labels by their shares (arXiv:1710.09412).

    `weights` scale each label's part. The mean is over the batch and not over its weights, so that processes that
    average their gradients compute the same as one process.
    """
    if batch.mix is None and weights is None:
        return F.cross_entropy(logits, batch.label, label_smoothing=label_smoothing)

    def per_sample(label: Int[Tensor, "b"]) -> Float[Tensor, "b"]:
        losses = F.cross_entropy(logits, label, label_smoothing=label_smoothing, reduction="none")
        return losses if weights is None else weights[label] * losses

    if batch.mix is None:
        return per_sample(batch.label).mean()
    return (batch.mix.weight * per_sample(batch.label) + (1 - batch.mix.weight) * per_sample(batch.mix.label)).mean()


def class_weights(counts: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
    """(1 - beta) / (1 - beta^n): the inverse of each class's effective number (Cui et al., arXiv:1901.05555).

    Differs from the paper: scaled to a mean of 1 over the training images instead of a sum of K over the classes, so
    that the loss keeps its size beside a distillation term, as with F.cross_entropy's own weights.
    """
    counts = counts.clamp(min=1).double()
    weights = (1 - BETA) / (1 - BETA**counts)
    return (weights * counts.sum() / (weights * counts).sum()).float()


def log_prior(counts: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
    """Logarithm of each class's share of the training images; added to the logits in training, not in prediction
    (logit-adjusted loss with tau = 1, Menon et al., arXiv:2007.07314, section 4.2)."""
    counts = counts.clamp(min=1).double()
    return (counts / counts.sum()).log().float()


class BalancedCrossEntropy(nn.Module):
    """cross_entropy with --label-smoothing, and with the class weights or the logit adjustment of --balance.

    Applies to the labels only: the distillation terms are not balanced.
    """

    def __init__(self, balance: str, labels: Int[Tensor, "n"] | None, classes: int, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing
        counts = None if labels is None else torch.bincount(labels, minlength=classes)
        self.register_buffer("weights", class_weights(counts) if balance == "weights" else None, persistent=False)
        self.register_buffer("shift", log_prior(counts) if balance == "logit-adjust" else None, persistent=False)

    def forward(self, logits: Float[Tensor, "b k"], batch: Batch) -> Float[Tensor, ""]:
        shifted = logits if self.shift is None else logits + self.shift
        return cross_entropy(shifted, batch, self.label_smoothing, self.weights)
