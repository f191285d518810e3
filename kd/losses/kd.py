"""Knowledge distillation (Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531).

Also logit standardisation (Sun et al., "Logit Standardization in Knowledge Distillation", arXiv:2403.01427), which
--standardize adds to any method of logits.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kd.config import KDConfig
from kd.config.methods import LogitFlags
from kd.errors import require
from kd.losses.base import DistillationLoss
from kd.types import Batch, Outputs

EQUAL = 1e-6  # a row of logits with less deviation has no order that could be compared


def kd_loss(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    temperature: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """T^2 * KL(teacher || student) between softened predictions (section 2).

    Summed over classes, averaged over the batch. The factor T^2 keeps its gradients comparable with cross-entropy's.
    With the arguments exchanged it is the reverse divergence.
    Raises ValueError if the shapes differ (F.kl_div would broadcast).
    """
    check_shapes(student_logits, teacher_logits)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def masked_kd_loss(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    mask: Bool[Tensor, "b"],
    temperature: float,
) -> Float[Tensor, ""]:
    """kd_loss of the samples in the mask; the mean is over the whole batch, so that few samples count little.

    Raises ValueError if the shapes differ."""
    check_shapes(student_logits, teacher_logits)
    log_student, log_teacher = ((z / temperature).log_softmax(dim=1) for z in (student_logits, teacher_logits))
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (divergence * mask).mean()


def standardize(logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Each row with mean 0 and deviation 1, so that the student matches the order and relative gaps of the logits only.

    (z - mean) / (1e-7 + std), with the unbiased deviation, as in the authors' code. Rows of equal logits, such as those
    of a classifier that starts at zero, stay undivided: the quotient's gradient would be ten million times too large.
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    deviation = logits.var(dim=1, keepdim=True).clamp_min(1e-24).sqrt()  # torch's own std has no finite gradient at 0
    return torch.where(deviation > EQUAL, centred / (1e-7 + deviation), centred)


class KD(DistillationLoss):
    """(1 - alpha) * cross-entropy + alpha * kd_loss, the weights of the report's section 3.3."""

    config: KDConfig

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        alpha, temperature = self.config.alpha, self.config.temperature
        logits = logits_of(self.config, student, teacher)
        if self.config.direction == "reverse":
            logits = logits[::-1]
        return {
            **self.hard_labels_term(batch, student.logits, weight=1 - alpha),
            "kd": alpha * self.config.boost * kd_loss(*logits, temperature),
        }

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        return soft_logits(self.config, teacher, self.config.temperature)


def check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    require(
        student_logits.shape == teacher_logits.shape,
        f"logits of student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)} differ in shape",
    )


def logits_of(
    config: LogitFlags, student: Outputs, teacher: Outputs
) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Both networks' logits, standardised with --standardize."""
    if config.standardize:
        return standardize(student.logits), standardize(teacher.logits)
    return student.logits, teacher.logits


def soft_logits(config: LogitFlags, teacher: Outputs, temperature: float | Float[Tensor, ""]) -> Float[Tensor, "b k"]:
    """The teacher's logits divided by the temperature, standardised with --standardize."""
    return (standardize(teacher.logits) if config.standardize else teacher.logits) / temperature
