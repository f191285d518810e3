"""Decoupled knowledge distillation (Zhao et al., arXiv:2203.08679)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kd.config.methods import DKDConfig
from kd.losses.base import DistillationLoss, ramp
from kd.losses.kd import check_shapes, kd_loss, logits_of, soft_logits
from kd.types import Batch, Outputs


def mask_label(logits: Float[Tensor, "b k"], labels: Int[Tensor, "b"]) -> Float[Tensor, "b k-1"]:
    """Each row without its label's logit."""
    column = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, column + (column >= labels[:, None]))


def dkd_loss(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, "b"],
    alpha: float,
    beta: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """T^2 * (alpha * TCKD + beta * NCKD), averaged over the batch.

    TCKD is the divergence of (label, rest), NCKD that among the other classes alone; kd_loss is TCKD plus NCKD weighted
    by the teacher's doubt, 1 - p(label). NCKD is 0 for two classes. Stays in logarithms: the authors'
    log(softmax) and their mask of -1000 give inf and NaN for far logits.
    Raises ValueError where the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    student_binary, teacher_binary = (_binary(z / temperature, labels) for z in (student_logits, teacher_logits))
    target = kd_loss(student_binary, teacher_binary, 1.0)
    rest = kd_loss(mask_label(student_logits, labels), mask_label(teacher_logits, labels), temperature)
    return alpha * temperature**2 * target + beta * rest


def _binary(logits: Float[Tensor, "b k"], labels: Int[Tensor, "b"]) -> Float[Tensor, "b 2"]:
    """Logits of the label against all other classes together."""
    return torch.cat(
        [logits.gather(1, labels[:, None]), mask_label(logits, labels).logsumexp(dim=1, keepdim=True)], dim=1
    )


class DKD(DistillationLoss):
    """Cross-entropy + dkd_loss, which rises linearly over the first epochs, as in the authors' code."""

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
