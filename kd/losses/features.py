"""What the methods of features share: shapes from the probe, sizes made equal, the terms they are added to."""

from abc import abstractmethod
from collections.abc import Iterator

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.config.methods import FeatureFlags
from kd.errors import UserError, require
from kd.losses.base import DistillationLoss
from kd.losses.kd import kd_loss
from kd.models.features import list_layers
from kd.types import Batch, Outputs, Pair, Stages


class FeatureLoss(DistillationLoss):
    """A method of features: of the stages that the networks name, or of the layers that the flags name."""

    config: FeatureFlags

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"] | None:
        return teacher.logits / self.config.kd_temperature if self.config.kd_weight else None

    @classmethod
    @abstractmethod
    def wanted(cls, config: FeatureFlags, stages: Stages) -> tuple[str, ...]:
        """What it compares of a network with these stages; nothing where they are not enough."""

    @classmethod
    def layers(
        cls, config: FeatureFlags, ours: Stages, theirs: Stages | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Where the networks name different numbers of stages, their last ones are paired.

        Raises: UserError where there are none, or not as many of each.
        """
        if theirs is None:
            return cls._named(config.student_layers, config, ours, "student"), ()
        count = min((len(part.maps) for part in (ours, theirs) if part.maps), default=0)
        ours, theirs = (part._replace(maps=part.maps[max(len(part.maps) - count, 0) :]) for part in (ours, theirs))
        students = cls._named(config.student_layers, config, ours, "student")
        teachers = cls._named(config.teacher_layers, config, theirs, "teacher")
        require(
            len(students) == len(teachers),
            f"student layers ({', '.join(students)}) and teacher layers ({', '.join(teachers)}) do not pair up:"
            " --student-layers and --teacher-layers take as many of each",
        )
        return students, teachers

    @classmethod
    def _named(cls, given: tuple[str, ...], config: FeatureFlags, stages: Stages, whose: str) -> tuple[str, ...]:
        names = given or cls.wanted(config, stages)
        if not names:
            raise UserError(
                f"the {whose}'s model does not say where its features are; name some with --{whose}-layers:"
                f" {list_layers(stages.modules)}"
            )
        return names

    def usual_terms(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and plain kd where --kd-weight asks for it."""
        terms, config = {"ce": self.cross_entropy(student.logits, batch)}, self.config
        if config.kd_weight:
            terms["kd"] = config.kd_weight * kd_loss(student.logits, teacher.logits, config.kd_temperature)
        return terms


def pair_layers(student: Outputs, teacher: Outputs) -> Iterator[tuple[Tensor, Tensor]]:
    """The features that belong together, in order of depth."""
    return zip(student.features.values(), teacher.features.values(), strict=True)


def probed_maps(pair: Pair, only_one: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Both networks' maps for the probing images. Raises UserError where a layer gives no map, b x c x h x w."""
    for name, feature in (*pair.student.features.items(), *pair.teacher.features.items()):
        shape = tuple(feature.shape)
        require(len(shape) == 4, f"layer {name!r} gives {shape}; this method compares maps, b x c x h x w")
    return _probed(pair, only_one)


def probed_embeddings(pair: Pair) -> tuple[int, int]:
    """How wide both networks' flattened features are. Raises UserError unless there is one layer of each."""
    ((student, teacher),) = _probed(pair, only_one=True)
    return student.flatten(1).shape[1], teacher.flatten(1).shape[1]


def _probed(pair: Pair, only_one: bool) -> list[tuple[Tensor, Tensor]]:
    given = len(pair.student.features)
    require(given == 1 or not only_one, f"this method compares one layer, {given} were given: name one")
    return list(pair_layers(pair.student, pair.teacher))


def embeddings(student: Outputs, teacher: Outputs) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b e"]]:
    """The one feature of each network, flattened."""
    ((ours, theirs),) = pair_layers(student, teacher)
    return ours.flatten(1), theirs.flatten(1)


def same_size(
    student_map: Float[Tensor, "b c h w"], teacher_map: Float[Tensor, "b c2 h2 w2"]
) -> tuple[Float[Tensor, "b c h3 w3"], Float[Tensor, "b c2 h3 w3"]]:
    """Both maps average-pooled to the smaller height and width, as the authors' codes do."""
    size = tuple(min(ours, theirs) for ours, theirs in zip(student_map.shape[2:], teacher_map.shape[2:]))
    return pool_to(student_map, size), pool_to(teacher_map, size)


def pool_to(feature_map: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
    """Average-pooled to this height and width; by whole windows where they fit, whose gradient a GPU can repeat."""
    height, width = feature_map.shape[2:]
    if (height, width) == tuple(size):
        return feature_map
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(feature_map, (height // size[0], width // size[1]))
    return F.adaptive_avg_pool2d(feature_map, size)
