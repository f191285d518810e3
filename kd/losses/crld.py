"""Cross-view consistency regularisation (Zhang et al., "Cross-View Consistency Regularisation for Knowledge
Distillation", arXiv:2412.16493).

Both networks see two views of each image, one weakly and one strongly augmented.
"""

from jaxtyping import Float
from torch import Tensor

from kd.config.methods import CRLDConfig
from kd.losses.base import DistillationLoss
from kd.losses.kd import masked_kd_loss
from kd.types import Batch, Outputs


def crld_loss(
    student_logits: Float[Tensor, "b k"],
    student_strong: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    teacher_strong: Float[Tensor, "b k"],
    temperature: float,
    weak_threshold: float,
    strong_threshold: float,
) -> dict[str, Float[Tensor, ""]]:
    """The terms "within" and "across", without their weights (the authors' are 2 and 0.5, with T = 4, 0.9 and 0.2).

    within: kd_loss of the weak and of the strong view, of samples whose weak view gives the teacher a confidence of at
    least `weak_threshold`. across: kd_loss of each student view with the other view's teacher, of samples whose strong
    view gives at least `strong_threshold`. Means over the whole batch, masked samples counting as 0.
    Raises ValueError if the shapes differ.
    """
    sure = teacher_logits.softmax(dim=1).amax(dim=1) >= weak_threshold
    sure_of_strong = teacher_strong.softmax(dim=1).amax(dim=1) >= strong_threshold

    def divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return masked_kd_loss(student, teacher, mask, temperature)

    return {
        "within": divergence(student_logits, teacher_logits, sure) + divergence(student_strong, teacher_strong, sure),
        "across": divergence(student_strong, teacher_logits, sure_of_strong)
        + divergence(student_logits, teacher_strong, sure_of_strong),
    }


class CRLD(DistillationLoss):
    """ce_weight * cross-entropy of each view + within_weight and across_weight * the terms of crld_loss."""

    config: CRLDConfig

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        views = (student.logits, student.strong, teacher.logits, teacher.strong)
        terms = crld_loss(*views, config.temperature, config.weak_threshold, config.strong_threshold)
        return {
            **self.hard_labels_term(batch, student.logits, student.strong, weight=config.ce_weight),
            "within": config.within_weight * terms["within"],
            "across": config.across_weight * terms["across"],
        }

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        return teacher.logits / self.config.temperature
