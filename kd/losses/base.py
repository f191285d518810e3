"""What every method is, and how it meets the student."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.outputs import Batch, Outputs, Pair, Stages, Tap


class DistillationLoss(nn.Module, ABC):
    """A method: weighted loss terms by name, whose sum is minimised. What it trains of its own are its parameters."""

    needs_teacher = True
    needs_hard_labels = False  # refuses mixup and cutmix, whose images have two

    def __init__(self, config, pair: Pair):
        super().__init__()
        self.config = config
        self.student_layers = tuple(pair.student.features)  # what forward finds in student.features
        self.teacher_layers = tuple(pair.teacher.features) if pair.teacher else ()
        self.recipe: dict = {}  # how `rebuild` makes the deployed network; JSON, empty where it is the student

    @classmethod
    def layers(cls, config, ours: Stages, theirs: Stages | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The features it wants of the student and of the teacher (who may not be there yet): here none."""
        return (), ()

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """Scalar terms, each averaged over the batch of this process; float32, with autocast off."""

    def deployed(self, student: nn.Module) -> nn.Module:
        """The network that is trained, scored, saved and exported; called once."""
        return student

    @classmethod
    def rebuild(cls, student: nn.Module, recipe: dict) -> nn.Module:
        """The deployed network, weights aside, from a fresh student and a saved `recipe`."""
        return student


def cross_entropy(logits: Float[Tensor, "b k"], batch: Batch, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Cross-entropy with the label; of a mixed image with both of its labels, each by its share (arXiv:1710.09412)."""
    if batch.mix is None:
        return F.cross_entropy(logits, batch.label, label_smoothing=label_smoothing)
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    own, other = (F.cross_entropy(logits, label, **options) for label in (batch.label, batch.mix.label))
    return (batch.mix.weight * own + (1 - batch.mix.weight) * other).mean()


class Distiller(nn.Module):
    """Everything trainable behind one forward, so that data parallelism sees all of it."""

    def __init__(self, student: nn.Module, loss: DistillationLoss):
        super().__init__()
        self.student = loss.deployed(student)
        self.loss = loss
        self.tap = Tap(self.student, loss.student_layers)

    @property
    def deployed(self) -> nn.Module:
        return self.student

    def forward(self, batch: Batch, teacher: Outputs | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits (b x k, float32) and the loss terms."""
        student = self.tap(batch.image)
        # Losses lose digits in half precision: a Gram matrix in bfloat16 is off by 2e-3.
        with torch.autocast(batch.image.device.type, enabled=False):
            student = _float(student)
            return student.logits, self.loss(student, teacher and _float(teacher), batch)


def _float(outputs: Outputs) -> Outputs:
    return Outputs(outputs.logits.float(), {name: feature.float() for name, feature in outputs.features.items()})
