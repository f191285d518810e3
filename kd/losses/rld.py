"""Refined logit distillation (Sun et al., "Knowledge Distillation with Refined Logits", arXiv:2408.07703)."""

import math

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kd.config.methods import RLDConfig
from kd.losses.base import DistillationLoss, ramp
from kd.losses.dkd import binary_logits
from kd.losses.kd import check_shapes, kd_loss, logits_of, soft_logits
from kd.types import Batch, Outputs


def rld_loss(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, "b"],
    alpha: float,
    beta: float,
    temperature: float,
    binary_temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """alpha * T1^2 * SCD + beta * T^2 * MCD, averaged over the batch: a teacher corrected where it is wrong.

    SCD (sample confidence): KL between two-class distributions at `binary_temperature` T1; the teacher's is its largest
    probability and the rest, the student's is the label's and the rest. MCD (masked correlation): KL over the classes
    that the teacher ranks below the label; 0 if there is none, and for two classes.
    Computed in logarithms: the authors' log(softmax) is infinite for distant logits, and their mask is -1e9.
    Raises ValueError if the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    student_binary = binary_logits(student_logits / binary_temperature, labels)
    teacher_binary = binary_logits(teacher_logits / binary_temperature, teacher_logits.argmax(dim=1))
    scd = binary_temperature**2 * kd_loss(student_binary, teacher_binary, 1.0)
    return alpha * scd + beta * _below_label(student_logits, teacher_logits, labels, temperature)


def _below_label(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Float[Tensor, ""]:
    """T^2 * KL over the classes that the teacher ranks below the label."""
    below = teacher < teacher.gather(1, labels[:, None])
    kept = below | ~below.any(dim=1, keepdim=True)  # a softmax over no class is NaN: keep all, and count the row as 0
    log_student, log_teacher = (
        (z / temperature).masked_fill(~kept, -math.inf).log_softmax(dim=1).masked_fill(~below, 0.0)
        for z in (student, teacher)
    )
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return temperature**2 * (divergence * below).sum(dim=1).mean()


class RLD(DistillationLoss):
    """Cross-entropy + rld_loss, whose weight rises linearly over the first epochs as in the authors' code."""

    config: RLDConfig
    needs_hard_labels = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        logits = logits_of(config, student, teacher)
        weights = config.alpha, config.beta, config.temperature, config.binary_temperature
        return {
            "ce": self.cross_entropy(student.logits, batch),
            "rld": ramp(batch.epoch, config.ramp_epochs) * rld_loss(*logits, batch.label, *weights),
        }

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        return soft_logits(self.config, teacher, self.config.temperature)
