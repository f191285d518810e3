"""Streamlined knowledge distillation (CVPR 2026; code: https://github.com/HyunJunSik/StreamLined)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.config.methods import SKDConfig
from kd.losses.base import DistillationLoss, global_batch
from kd.losses.kd import check_shapes, kd_loss, logits_of, soft_logits
from kd.types import Batch, Outputs


def skd_loss(
    student_logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"], ridge: float = 0.1
) -> Float[Tensor, ""]:
    """Direction loss: mean Mahalanobis norm of the rows of G_s - G_t, where G is the batch's cosine similarity / k.

    sqrt(d' C^-1 d) for each row d, with C the covariance of all rows plus `ridge` * identity. Depends on the batch, and
    the cost grows with its size cubed. Divided by the number of classes k as in the authors' code.
    Raises ValueError if the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    units = (F.normalize(z, dim=1) for z in (student_logits, teacher_logits))
    student, teacher = (unit @ unit.T / student_logits.shape[1] for unit in units)
    rows = student - teacher
    centred, identity = rows - rows.mean(dim=0), torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    covariance = centred.T @ centred / max(len(rows) - 1, 1) + ridge * identity
    factor, _ = torch.linalg.cholesky_ex(covariance)  # unlike cholesky it asks the device for no error, so no sync
    whitened = torch.linalg.solve_triangular(factor, rows.T, upper=False)
    return whitened.square().sum(dim=0).clamp_min(1e-24).sqrt().mean()  # equal networks: sqrt has no gradient at 0


class SKD(DistillationLoss):
    """Cross-entropy + kd_weight * KL without T^2 + direction_weight * skd_loss over the global batch."""

    config: SKDConfig
    compares_images = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        config, logits = self.config, logits_of(self.config, student, teacher)
        direction = skd_loss(*(global_batch(share) for share in logits), config.ridge)
        return {
            **self.hard_labels_term(batch, student.logits, weight=config.ce_weight),
            "kd": config.kd_weight * kd_loss(*logits, config.temperature) / config.temperature**2,
            "skd": config.direction_weight * direction,
        }

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        return soft_logits(self.config, teacher, self.config.temperature)
