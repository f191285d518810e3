"""What flows between the parts: a batch into the networks, their outputs into the losses."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

INPUT = ".input"  # "fc.input" names what enters the module fc: where pooling is no module of its own


class Mix(NamedTuple):
    """What mixup or cutmix made of a batch: `label` of Batch stays hard and has the share `weight` of its image."""

    label: Int[Tensor, "b"]  # the other image's
    weight: Float[Tensor, "b"]


class Batch(NamedTuple):
    """One step's samples of one process, on its device."""

    image: Float[Tensor, "b 3 h w"]  # augmented and normalised
    label: Int[Tensor, "b"]
    index: Int[Tensor, "b"]  # rows of the training split
    view: Int[Tensor, ""]  # which view of each image; the epoch, where every epoch has its own
    epoch: Int[Tensor, ""]  # 0-dim tensors, all three: a compiled step must not recompile for them
    step: Int[Tensor, ""]
    mix: Mix | None = None


class Outputs(NamedTuple):
    """What a network says of a batch."""

    logits: Float[Tensor, "b k"]
    features: dict[str, Tensor] = {}  # noqa: RUF012  named intermediates, for methods that want them; never changed


class Step(NamedTuple):
    """What one forward pass of training gives."""

    logits: Float[Tensor, "b k"]  # the student's
    terms: dict[str, Tensor]  # weighted losses, whose sum is minimised
    measures: dict[str, Tensor] = {}  # noqa: RUF012  means over the batch, to be looked at only; never changed


class Stages(NamedTuple):
    """Where a network's features are: dotted names, in order of depth."""

    maps: tuple[str, ...] = ()  # outputs of the stages, b x c x h x w; the last one is what is pooled
    classifier: str | None = None  # the last linear layer over the classes; what enters it is the embedding
    modules: tuple[str, ...] = ()  # all that could be tapped instead

    @property
    def embedding(self) -> tuple[str, ...]:
        return (self.classifier + INPUT,) if self.classifier else ()


class Pair(NamedTuple):
    """What a method may know of its two networks and the data before training, and no more."""

    student: Outputs  # for two probing images; its features are those that the method asked for
    teacher: Outputs | None
    labels: Int[Tensor, "n"] | None = None  # of the training split, by Batch.index
    student_stages: Stages = Stages()
    teacher_stages: Stages = Stages()
    head: nn.Module | None = None  # the teacher's classifier; never trained
    balance: str = "none"  # how cross-entropy meets classes that differ in size (--balance)
    partner: nn.Module | None = None  # a fresh network, for a method that trains it beside the student
