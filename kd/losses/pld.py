"""Plackett-Luce distillation (Bassam et al., "PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
arXiv:2506.12542)."""

import math

from jaxtyping import Float, Int
from torch import Tensor

from kd.config.methods import PLDConfig
from kd.losses.base import DistillationLoss
from kd.losses.kd import check_shapes
from kd.types import Batch, Outputs


def pld_loss(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, "b"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Minus the log-likelihood that the student ranks the classes as the teacher does, averaged over the batch.

    The ranking is the label first, then the others from the teacher's largest logit to its smallest, equal ones by
    class number. Each choice, of one class among those left, has the weight that the teacher gives this class at
    temperature T; the student has no temperature. The first choice is cross-entropy times the label's weight.
    Raises ValueError if the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    # Sorted on the device, from the last rank to the first, so that a running logsumexp is one over the classes left.
    order = teacher_logits.scatter(1, labels[:, None], math.inf).flip(1).sort(dim=1, stable=True).indices
    order = student_logits.shape[1] - 1 - order
    ranked = student_logits.gather(1, order)
    weights = (teacher_logits / temperature).softmax(dim=1).gather(1, order)
    return (weights * (ranked.logcumsumexp(dim=1) - ranked)).sum(dim=1).mean()


class PLD(DistillationLoss):
    """pld_loss alone, whose first choice takes the place of cross-entropy."""

    config: PLDConfig
    needs_hard_labels = True
    has_cross_entropy = False

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"pld": pld_loss(student.logits, teacher.logits, batch.label, self.config.temperature)}

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        return teacher.logits / self.config.temperature  # the weights of the ranking
