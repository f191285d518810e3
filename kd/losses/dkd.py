"""Decoupled knowledge distillation (Zhao et al., arXiv:2203.08679)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kd.config.methods import DKDConfig
from kd.losses.base import DistillationLoss, ramp
from kd.losses.kd import check_shapes, kd_loss, logits_of, soft_logits
from kd.types import Batch, Outputs


def dkd_loss(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, "b"],
    alpha: float,
    beta: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """T^2 * (alpha * TCKD + beta * NCKD), averaged over the batch.

    TCKD is the KL divergence between the two networks' binary distributions (label, everything else), NCKD the one
    between their distributions over the other classes; kd_loss is TCKD + (1 - p(label)) * NCKD, with the teacher's p.
    NCKD is 0 for two classes.
    Computed in logarithms: the authors' log(softmax) and mask of -1000 give inf and NaN for distant logits.
    Raises ValueError if the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    student_binary, teacher_binary = (binary_logits(z / temperature, labels) for z in (student_logits, teacher_logits))
    tckd = kd_loss(student_binary, teacher_binary, 1.0)
    nckd = kd_loss(without_label(student_logits, labels), without_label(teacher_logits, labels), temperature)
    return alpha * temperature**2 * tckd + beta * nckd  # kd_loss has already scaled nckd by T^2


def binary_logits(logits: Float[Tensor, "b k"], labels: Int[Tensor, "b"]) -> Float[Tensor, "b 2"]:
    """Two logits: the label's, and that of all other classes together."""
    return torch.cat(
        [logits.gather(1, labels[:, None]), without_label(logits, labels).logsumexp(dim=1, keepdim=True)], dim=1
    )


def without_label(logits: Float[Tensor, "b k"], labels: Int[Tensor, "b"]) -> Float[Tensor, "b k-1"]:
    """Each row without its label's logit."""
    column = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, column + (column >= labels[:, None]))


class DKD(DistillationLoss):
    """Cross-entropy + dkd_loss, whose weight rises linearly over the first epochs as in the authors' code."""

    config: DKDConfig
    needs_hard_labels = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        logits = logits_of(config, student, teacher)
        term = dkd_loss(*logits, batch.label, config.alpha, config.beta, config.temperature)
        return {
            "ce": self.cross_entropy(student.logits, batch),
            "dkd": ramp(batch.epoch, config.ramp_epochs) * term,
        }

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        return soft_logits(self.config, teacher, self.config.temperature)
