"""The tuples passed between data, networks and losses: Batch, Outputs, Step, Stages, Pair."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

INPUT = ".input"  # "fc.input" names the input of module fc; needed if a network pools without a module


class Mix(NamedTuple):
    """Labels of a batch mixed by mixup or cutmix; Batch.label stays hard."""

    label: Int[Tensor, "b"]  # of the image mixed in
    weight: Float[Tensor, "b"]  # share of Batch.label


class Batch(NamedTuple):
    """One step's samples of one process, on its device."""

    image: Float[Tensor, "b 3 h w"]  # augmented and normalised
    label: Int[Tensor, "b"]  # -1 for each image of data without labels
    index: Int[Tensor, "b"]  # rows of the training split; -1 for images of another one
    view: Int[Tensor, ""]  # which augmented view of each image; the epoch, unless --views repeats a fixed number
    epoch: Int[Tensor, ""]  # view, epoch and step are 0-dim tensors: a compiled step would recompile for each int
    step: Int[Tensor, ""]
    mix: Mix | None = None
    strong: Float[Tensor, "b 3 h w"] | None = None  # a second, strongly augmented view; for methods with two_views


class Outputs(NamedTuple):
    """A network's outputs for a batch."""

    logits: Float[Tensor, "b k"]
    features: dict[str, Tensor] = {}  # noqa: RUF012  layer name -> its output, for feature methods; never mutated
    strong: Float[Tensor, "b k"] | None = None  # logits of Batch.strong


class Step(NamedTuple):
    """Results of one forward pass in training."""

    logits: Float[Tensor, "b k"]  # the student's
    terms: dict[str, Tensor]  # weighted losses, whose sum is minimised
    measures: dict[str, Tensor] = {}  # noqa: RUF012  means over the batch, for the log only; never mutated


class Stages(NamedTuple):
    """Where a network's features are: dotted module names, in order of depth."""

    maps: tuple[str, ...] = ()  # the stages that methods compare; each outputs b x c x h x w
    classifier: str | None = None  # the last linear layer over the classes; its input is the embedding
    modules: tuple[str, ...] = ()  # every module, for --student-layers and --teacher-layers
    pooled: str | None = None  # the map that is averaged into the classifier: the last of `maps`, or a later one
    before_relu: tuple[str, ...] = ()  # `maps` before the ReLU that ends each; the map itself if none does
    tokens: bool = False  # the maps are a transformer's: Tap made them from tokens, or from maps with channels last
    heads: tuple[str, ...] = ()  # the linear layers of class and distillation, if the network averages two

    @property
    def embedding(self) -> tuple[str, ...]:
        return (self.classifier + INPUT,) if self.classifier else ()

    def last(self, count: int) -> "Stages":
        """The same without the maps before the last `count`."""
        first = max(len(self.maps) - count, 0)
        return self._replace(maps=self.maps[first:], before_relu=self.before_relu[first:])


class Pair(NamedTuple):
    """All that a method may know of its two networks and the data before training."""

    student: Outputs  # for two probe images, with the features of the method's layers
    teacher: Outputs | None
    labels: Int[Tensor, "n"] | None = None  # of the training split, in the order of Batch.index; None without labels
    student_stages: Stages = Stages()
    teacher_stages: Stages = Stages()
    head: nn.Module | None = None  # the teacher's classifier; never trained
    balance: str = "none"  # how cross-entropy treats classes of different sizes (--balance)
    partner: nn.Module | None = None  # a fresh network, for a method that trains one beside the student
    labelled: bool = True  # False: data without labels, on which the terms that need them are left out
    rows: int = 0  # training images
    width: int | None = None  # of what enters `head`, where the head itself is not known
