"""Teacher-free distillation (Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization",
arXiv:1909.11723)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kd.config.methods import TFKDConfig
from kd.losses.base import DistillationLoss
from kd.losses.kd import kd_loss
from kd.types import Batch, Outputs


def tfkd_loss(
    student_logits: Float[Tensor, "b k"], labels: Int[Tensor, "b"], correct: float, temperature: float
) -> Float[Tensor, ""]:
    """KL(virtual teacher || student), summed over classes, averaged over the batch.

    The virtual teacher gives the label probability `correct` and shares the rest among the other classes. As in the
    authors' code it is softened by a softmax of probabilities / T, which at T = 20 leaves it nearly uniform (0.0105 on
    the label of 100 classes), so that the loss is nearly label smoothing by alpha. The student is not softened, and
    there is no factor T^2.
    Differs from the authors' code: summed over classes, instead of averaged and multiplied by an extra factor.
    """
    classes = student_logits.shape[1]
    virtual = torch.full_like(student_logits, (1 - correct) / (classes - 1))
    virtual = virtual.scatter(1, labels[:, None], correct)
    return kd_loss(student_logits, virtual / temperature, 1.0)


class TFKD(DistillationLoss):
    """(1 - alpha) * cross-entropy + alpha * tfkd_loss."""

    config: TFKDConfig
    needs_hard_labels = True

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        alpha = self.config.alpha
        term = tfkd_loss(student.logits, batch.label, self.config.correct, self.config.temperature)
        return {"ce": (1 - alpha) * self.cross_entropy(student.logits, batch), "tfkd": alpha * term}
