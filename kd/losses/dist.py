"""DIST (Huang et al., "Knowledge Distillation from A Stronger Teacher", arXiv:2205.10536)."""

import torch
from jaxtyping import Float
from torch import Tensor

from kd.config.methods import DISTConfig
from kd.losses.base import DistillationLoss, global_batch
from kd.losses.kd import check_shapes, logits_of, soft_logits
from kd.types import Batch, Outputs

EQUAL = 1e-7  # the norm of centred probabilities below which they are equal, but for rounding


def dist_loss(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    beta: float,
    gamma: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """T^2 * (beta * (1 - correlation of rows) + gamma * (1 - correlation of columns)).

    Pearson's correlation of softened predictions: per sample over classes, and per class over the batch, each averaged.
    Differs from the paper: the factor T^2, as in the authors' code. Raises ValueError if the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    student, teacher = ((z / temperature).softmax(dim=1) for z in (student_logits, teacher_logits))
    rows, columns = _correlation(student, teacher).mean(), _correlation(student.T, teacher.T).mean()
    return temperature**2 * (beta * (1 - rows) + gamma * (1 - columns))


def _correlation(one: Float[Tensor, "n m"], other: Float[Tensor, "n m"]) -> Float[Tensor, "n"]:
    """Correlation of each pair of rows; eps is added as by the authors (F.cosine_similarity's differs by 2e-5).

    Undivided where all of `one` are equal, as of a classifier that starts at zero: the gradient would be 1 / eps.
    """
    one, other = (part - part.mean(dim=1, keepdim=True) for part in (one, other))
    norm = one.norm(dim=1)
    together = (one * other).sum(dim=1)
    return torch.where(norm > EQUAL, together / (norm * other.norm(dim=1) + 1e-8), together)


class DIST(DistillationLoss):
    """Cross-entropy + weight * dist_loss over the global batch: the column term needs many samples."""

    config: DISTConfig

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        logits = (global_batch(share) for share in logits_of(config, student, teacher))
        return {
            **self.hard_labels_term(batch, student.logits),
            "dist": config.weight * dist_loss(*logits, config.beta, config.gamma, config.temperature),
        }

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        return soft_logits(self.config, teacher, self.config.temperature)
