"""Transformed teacher matching, weighted or not (Zheng & Yang, arXiv:2402.11148)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.config.methods import WTTMConfig
from kd.losses.base import DistillationLoss
from kd.losses.kd import check_shapes
from kd.types import Batch, Outputs


def wttm_loss(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    exponent: float,
    weighted: bool = True,
) -> Float[Tensor, ""]:
    """KL(p_t^exponent / U || p_s), averaged over the batch with the weight U = sum over the classes of p_t^exponent.

    Summed over the classes. The teacher alone is softened (an exponent is the inverse of a temperature), and there is
    no factor T^2. U is large for images that the teacher is unsure of; without it (`weighted` false) this is TTM.
    Raises ValueError if the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    log_powers = exponent * teacher_logits.log_softmax(dim=1)
    log_teacher, log_student = log_powers.log_softmax(dim=1), student_logits.log_softmax(dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return (log_powers.logsumexp(dim=1).exp() * divergence if weighted else divergence).mean()


class WTTM(DistillationLoss):
    """Cross-entropy + weight * wttm_loss."""

    config: WTTMConfig

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        term = wttm_loss(student.logits, teacher.logits, config.exponent, not config.unweighted)
        return {"ce": self.cross_entropy(student.logits, batch), "wttm": config.used_weight * term}

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        return self.config.exponent * teacher.logits
