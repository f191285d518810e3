"""What every method is, and how it meets the student."""

from abc import ABC, abstractmethod

import torch
import torch.distributed as distributed
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.config import NoneConfig
from kd.losses.cross_entropy import BalancedCrossEntropy
from kd.metrics import closeness
from kd.models.features import Tap
from kd.types import Batch, Outputs, Pair, Stages, Step


class DistillationLoss(nn.Module, ABC):
    """A method: weighted loss terms by name, whose sum is minimised. What it trains of its own are its parameters."""

    needs_hard_labels = False  # refuses mixup and cutmix, whose images have two
    has_cross_entropy = True  # a term that --balance can change

    def __init__(self, config, pair: Pair):
        super().__init__()
        self.config = config
        self.student_layers = tuple(pair.student.features)  # what forward finds in student.features
        self.teacher_layers = tuple(pair.teacher.features) if pair.teacher else ()
        self.cross_entropy = BalancedCrossEntropy(pair.balance, pair.labels, pair.student.logits.shape[1])
        self.recipe: dict = {}  # how `rebuild` makes the deployed network; JSON, empty where it is the student

    @classmethod
    def layers(cls, config, ours: Stages, theirs: Stages | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The features it wants of the student and of the teacher (who may not be there yet): here none."""
        return (), ()

    @classmethod
    def partner(cls, config, model: str) -> str | None:
        """The network that it trains from scratch beside a student called `model`: here none."""
        return None

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """Scalar terms, each averaged over the batch of this process; float32, with autocast off."""

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"] | None:
        """The logits whose softmax the student follows; None for a method that follows no distribution."""
        return None

    def deployed(self, student: nn.Module) -> nn.Module:
        """The network that is trained, scored, saved and exported; called once."""
        return student

    @classmethod
    def rebuild(cls, student: nn.Module, recipe: dict) -> nn.Module:
        """The deployed network, weights aside, from a fresh student and a saved `recipe`."""
        return student


class Distiller(nn.Module):
    """Everything trainable behind one forward, so that data parallelism sees all of it.

    `compression`: how the student was compressed, for model.json; empty if it was not.
    """

    def __init__(self, student: nn.Module, loss: DistillationLoss, compression: dict | None = None):
        super().__init__()
        self.student = loss.deployed(student)
        self.loss, self.compression = loss, compression or {}
        self.tap = Tap(self.student, loss.student_layers)

    @property
    def deployed(self) -> nn.Module:
        return self.student

    def train(self, mode: bool = True) -> "Distiller":
        """What does not learn stays as it scores: a frozen BatchNorm keeps its statistics, and nothing frozen drops."""
        super().train(mode)
        for part in self.modules():
            parameters = list(part.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                part.eval()
        return self

    def forward(self, batch: Batch, teacher: Outputs | None) -> Step:
        """The student's logits (float32), the loss terms, and how close student and teacher are."""
        student = self.tap(batch.image)
        # Losses lose digits in half precision: a Gram matrix in bfloat16 is off by 2e-3.
        with torch.autocast(batch.image.device.type, enabled=False):
            student, teacher = _float(student), teacher and _float(teacher)
            terms = self.loss(student, teacher, batch)
            if teacher is None:
                return Step(student.logits, terms)
            soft_labels = self.loss.soft_labels(teacher)
            return Step(student.logits, terms, closeness(student.logits, teacher.logits, batch.label, soft_labels))


def _float(outputs: Outputs) -> Outputs:
    return Outputs(outputs.logits.float(), {name: feature.float() for name, feature in outputs.features.items()})


#: (kd.losses.gather) Losses over a whole batch see the global one, however many processes share it.


class _Gather(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather does this too, and warns that it will go.
    @staticmethod
    def forward(ctx, share: Tensor) -> Tensor:
        parts = [torch.empty_like(share) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, share)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # The sum over processes, each of which computed the loss of the whole batch. Data parallelism then averages
        # parameters' gradients over processes, and what is left is the gradient of that one loss.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


@torch.compiler.disable  # the compiler would rewrite the collectives; called as they are they cost one graph break
def global_batch(share: Tensor) -> Tensor:
    """All processes' equal shares of a batch, in order, with gradients to each; alone, the tensor itself."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return share
    return _Gather.apply(share.contiguous())


#: (kd.losses.none) Cross-entropy alone: the teacher's own loss, and the control that every comparison needs.


class CrossEntropy(DistillationLoss):
    """With label smoothing if asked (Szegedy et al., arXiv:1512.00567, section 7)."""

    config: NoneConfig

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"ce": self.cross_entropy(student.logits, batch, self.config.label_smoothing)}


def ramp(epoch: Int[Tensor, ""], epochs: float) -> Float[Tensor, ""]:
    """min(epoch / epochs, 1), with epochs counted from 1 as in the authors' code; stays on the device."""
    return ((epoch + 1) / max(epochs, 1e-9)).clamp(max=1)
