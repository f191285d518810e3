"""Mimic learning (Ba & Caruana, "Do Deep Nets Really Need to be Deep?", arXiv:1312.6184)."""

from jaxtyping import Float
from torch import Tensor

from kd.config.methods import MimicConfig
from kd.losses.base import DistillationLoss
from kd.losses.kd import check_shapes, logits_of
from kd.types import Batch, Outputs


def mimic_loss(student_logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Mean squared difference of the logits over samples and classes (section 2.2).

    Differs from the paper: each sample's logits are centred first. Softmax ignores their mean, so the student need not
    match it; and only for centred logits does kd's gradient tend to this one's at high temperature (arXiv:1503.02531,
    section 2.1).
    Raises ValueError if the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    difference = student_logits - teacher_logits
    return (difference - difference.mean(dim=1, keepdim=True)).square().mean()


class Mimic(DistillationLoss):
    """label_weight * cross-entropy + weight * mimic_loss."""

    config: MimicConfig

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {
            **self.hard_labels_term(batch, student.logits, weight=self.config.label_weight),
            "mimic": self.config.weight * mimic_loss(*logits_of(self.config, student, teacher)),
        }
