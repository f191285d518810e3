"""Apprentice, scheme A (Mishra & Marr, arXiv:1711.05852): teacher and low-precision student learn together.

Schemes B and C need no method of their own: `kd --alpha 0.5 --temperature 1 --weight-bits 2` with a trained teacher is
B, and with --init, the student trained in full precision, C.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.config.methods import ApprenticeConfig
from kd.losses.base import DistillationLoss
from kd.losses.kd import check_shapes
from kd.types import Batch, Outputs, Pair


def soft_cross_entropy(student_logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Cross-entropy of the student's probabilities with the teacher's, averaged over the batch.

    No temperature: the paper has 1. Raises ValueError where the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    return F.cross_entropy(student_logits, teacher_logits.softmax(dim=1))


class Apprentice(DistillationLoss):
    """alpha * the teacher's cross-entropy + beta * the student's + gamma * soft_cross_entropy.

    The last term moves the student alone: the teacher learns from the labels. Its network is a part of this module, so
    it is in checkpoints, data parallelism and the optimizer, and not in what is exported.
    """

    config: ApprenticeConfig

    @classmethod
    def partner(cls, config: ApprenticeConfig, model: str) -> str:
        return config.partner or model

    def __init__(self, config: ApprenticeConfig, pair: Pair):
        super().__init__(config, pair)
        self.teacher = pair.partner

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        logits = self.teacher(batch.image)
        return {
            "teacher_ce": self.config.alpha * self.cross_entropy(logits, batch),
            "ce": self.config.beta * self.cross_entropy(student.logits, batch),
            "soft": self.config.gamma * soft_cross_entropy(student.logits, logits.detach()),
        }
