"""Cross-entropy alone: the teacher's own loss, and the control that every comparison needs."""

from torch import Tensor

from kd.losses.base import DistillationLoss
from kd.methods.logits import NoneConfig
from kd.outputs import Batch, Outputs


class CrossEntropy(DistillationLoss):
    """With label smoothing if asked (Szegedy et al., arXiv:1512.00567, section 7)."""

    config: NoneConfig

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"ce": self.cross_entropy(student.logits, batch, self.config.label_smoothing)}
