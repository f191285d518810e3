"""Normalised knowledge distillation (Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation",
arXiv:2303.13005)."""

from jaxtyping import Float, Int
from torch import Tensor

from kd.config.methods import NKDConfig
from kd.losses.base import DistillationLoss
from kd.losses.dkd import without_label
from kd.losses.kd import check_shapes
from kd.types import Batch, Outputs


def nkd_loss(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, "b"],
    gamma: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """-p_t(label) log p_s(label) - gamma * T^2 * sum over the other classes of N(p_t) log N(p_s).

    Averaged over the batch. N is the softmax over the classes other than the label, at temperature T; p has no
    temperature. The other classes' part is 0 for two classes. A cross-entropy, so not 0 for equal logits.
    Raises ValueError if the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    column = labels[:, None]
    target = teacher_logits.softmax(dim=1).gather(1, column) * student_logits.log_softmax(dim=1).gather(1, column)
    student, teacher = (without_label(z, labels) / temperature for z in (student_logits, teacher_logits))
    others = (teacher.softmax(dim=1) * student.log_softmax(dim=1)).sum(dim=1)
    return -target.mean() - gamma * temperature**2 * others.mean()


class NKD(DistillationLoss):
    """Cross-entropy + nkd_loss."""

    config: NKDConfig
    needs_hard_labels = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        term = nkd_loss(student.logits, teacher.logits, batch.label, self.config.gamma, self.config.temperature)
        return {"ce": self.cross_entropy(student.logits, batch), "nkd": term}

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        return teacher.logits / self.config.temperature
