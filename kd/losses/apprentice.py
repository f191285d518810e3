"""Apprentice, scheme A (Mishra & Marr, arXiv:1711.05852): teacher and low-precision student are trained together.

Schemes B and C need no method of their own. B: `kd --alpha 0.5 --temperature 1 --weight-bits 2` with a trained teacher.
C: the same with --init RUN, a student trained in full precision.
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

    At temperature 1, as in the paper. Raises ValueError if the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    return F.cross_entropy(student_logits, teacher_logits.softmax(dim=1))


class Apprentice(DistillationLoss):
    """alpha * the teacher's cross-entropy + beta * the student's + gamma * soft_cross_entropy.

    The last term has no gradient in the teacher, which learns from the labels alone. The teacher is a part of this
    module: DDP, the optimizer and checkpoints include it, exports do not. As losses are, it is computed in float32,
    whatever --mixed-precision says.
    """

    config: ApprenticeConfig

    @classmethod
    def partner(cls, config: ApprenticeConfig, model: str) -> str:
        return config.partner or model

    def __init__(self, config: ApprenticeConfig, pair: Pair):
        super().__init__(config, pair)
        self.teacher = pair.partner

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        teacher_logits = self.teacher(batch.image)
        return {
            "teacher_ce": self.config.alpha * self.cross_entropy(teacher_logits, batch),
            "ce": self.config.beta * self.cross_entropy(student.logits, batch),
            "soft": self.config.gamma * soft_cross_entropy(student.logits, teacher_logits.detach()),
        }
