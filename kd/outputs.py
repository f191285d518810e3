"""What flows between the parts: a batch into the networks, their outputs into the losses."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


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


class Pair(NamedTuple):
    """What a method may know of its two networks before training: their outputs on two probing images, no more."""

    student: Outputs
    teacher: Outputs | None
