"""What feature methods share: the choice of layers, checks of their shapes, equal sizes, and the common loss terms."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

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
    """A method that compares features: of the layers that the flags name, or of the networks' known stages."""

    config: FeatureFlags

    @classmethod
    @abstractmethod
    def default_layers(cls, config: FeatureFlags, stages: Stages) -> tuple[str, ...]:
        """Layers to compare in a network with these stages; empty if it lacks the stages needed."""

    @classmethod
    def default_teacher_layers(cls, config: FeatureFlags, stages: Stages) -> tuple[str, ...]:
        """The same in the teacher, if the method takes others there."""
        return cls.default_layers(config, stages)

    def __init__(self, config: FeatureFlags, pair: Pair):
        super().__init__(config, pair)
        self._stages = pair.student_stages, pair.teacher_stages

    @classmethod
    def layers(
        cls, config: FeatureFlags, student: Stages, teacher: Stages | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Layers as (student's, teacher's). If the networks differ in number of stages, the last ones are paired.

        Raises: UserError if there are none, or not equally many of each.
        """
        for side, named in (("student", config.student_layers), ("teacher", config.teacher_layers)):
            check_once(named, f"--{side}-layers")
        if teacher is None:
            return config.student_layers or _known(cls.default_layers(config, student), student, "student"), ()
        count = min((len(stages.maps) for stages in (student, teacher) if stages.maps), default=0)
        student, teacher = student.last(count), teacher.last(count)
        student_layers = config.student_layers or _known(cls.default_layers(config, student), student, "student")
        teacher_layers = config.teacher_layers or _known(
            cls.default_teacher_layers(config, teacher), teacher, "teacher"
        )
        require(
            len(student_layers) == len(teacher_layers),
            f"student layers ({', '.join(student_layers)}) and teacher layers ({', '.join(teacher_layers)}) do not pair"
            " up; name as many --student-layers as --teacher-layers",
        )
        return student_layers, teacher_layers

    def identity(self) -> dict:
        """The layers, if they are others than the first runs compared by default; those runs keep their identity."""
        layers = self.layers(self.config, *self._stages)
        before = self.layers(self.config, *(_first_default(stages) for stages in self._stages))
        return {} if layers == before else {"layers": layers}

    def common_terms(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and kd_loss with --kd-weight."""
        terms, config = self.hard_labels_term(batch, student.logits), self.config
        if config.kd_weight:
            terms["kd"] = config.kd_weight * kd_loss(student.logits, teacher.logits, config.kd_temperature)
        return terms

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"] | None:
        return teacher.logits / self.config.kd_temperature if self.config.kd_weight else None


def _known(layers: object, stages: Stages, role: str) -> tuple[str, ...]:
    """The layers. Raises UserError if there are none."""
    require(
        isinstance(layers, tuple | list),
        f"default_layers gives {layers!r}; let it return a tuple of layer names, empty if the network has none",
    )
    if not layers:
        raise UserError(
            f"the {role}'s model has no known stages to take features from; name layers with --{role}-layers:"
            f" {list_layers(stages.modules)}"
        )
    return layers


def _first_default(stages: Stages) -> Stages:
    """The maps that the first runs compared: the last was the pooled one, and none was taken before its ReLU."""
    maps = (*stages.maps[:-1], stages.pooled) if stages.pooled else stages.maps
    return stages._replace(maps=maps, before_relu=maps)


def check_once(layers: Sequence[str], flag: str) -> None:
    """Raise UserError if `flag` names a layer twice: features are kept by name, and one of the two would be lost."""
    twice = next((layer for layer in layers if layers.count(layer) > 1), "")
    require(not twice, f"{flag}: names {twice} twice; name each layer once")


def pair_layers(student: Outputs, teacher: Outputs) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of (student's, teacher's) feature, in order of depth."""
    return zip(student.features.values(), teacher.features.values(), strict=True)


def embeddings(student: Outputs, teacher: Outputs) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b e"]]:
    """The one feature of each network, flattened."""
    ((student_feature, teacher_feature),) = pair_layers(student, teacher)
    return student_feature.flatten(1), teacher_feature.flatten(1)


def probed_maps(pair: Pair, only_one: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Both networks' maps for the probe images. Raises UserError if a layer outputs no map, b x c x h x w."""
    for name, feature in (*pair.student.features.items(), *pair.teacher.features.items()):
        shape = tuple(feature.shape)
        require(
            len(shape) == 4,
            f"layer {name!r}: outputs {shape}, and this method compares maps, b x c x h x w; name another layer",
        )
    return _probed(pair, only_one)


def probed_embeddings(pair: Pair) -> tuple[int, int]:
    """Widths of both networks' flattened features. Raises UserError unless there is one layer of each."""
    ((student_feature, teacher_feature),) = _probed(pair, only_one=True)
    return student_feature.flatten(1).shape[1], teacher_feature.flatten(1).shape[1]


def _probed(pair: Pair, only_one: bool) -> list[tuple[Tensor, Tensor]]:
    count = len(pair.student.features)
    require(
        count == 1 or not only_one,
        f"this method compares one layer, and {count} were named; name one with --student-layers and --teacher-layers",
    )
    return list(pair_layers(pair.student, pair.teacher))


def check_batches(student: Tensor, teacher: Tensor) -> None:
    """Raise UserError (a ValueError) unless both have as many samples: what compares them would stretch one to many."""
    require(
        len(student) == len(teacher),
        f"features of {len(student)} samples of the student and {len(teacher)} of the teacher; give the same batch",
    )


def same_size(
    student_map: Float[Tensor, "b c h w"], teacher_map: Float[Tensor, "b c2 h2 w2"]
) -> tuple[Float[Tensor, "b c h3 w3"], Float[Tensor, "b c2 h3 w3"]]:
    """Both maps, average-pooled to the smaller height and width as in the authors' codes."""
    sizes = zip(student_map.shape[2:], teacher_map.shape[2:])
    size = tuple(min(student_side, teacher_side) for student_side, teacher_side in sizes)
    return pool_to(student_map, size), pool_to(teacher_map, size)


def pool_to(feature_map: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
    """The map, average-pooled to `size`; with equal windows if they fit, whose gradient is deterministic on a GPU."""
    height, width = feature_map.shape[2:]
    if (height, width) == tuple(size):
        return feature_map
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(feature_map, (height // size[0], width // size[1]))
    return F.adaptive_avg_pool2d(feature_map, size)
