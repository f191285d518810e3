"""Similarity-preserving distillation (Tung & Mori, arXiv:1907.09682)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.config.methods import SPConfig
from kd.losses.base import global_batch
from kd.losses.features import FeatureLoss, check_batches, pair_layers
from kd.types import Batch, Outputs, Stages


def similarity_preserving_loss(
    student_map: Float[Tensor, "b ..."], teacher_map: Float[Tensor, "b ..."]
) -> Float[Tensor, ""]:
    """|G_t - G_s|^2 / b^2 between the row-normalised Gram matrices of the flattened maps.

    Raises ValueError if the batches differ.
    """
    check_batches(student_map, teacher_map)
    flattened = (student_map.flatten(1), teacher_map.flatten(1))
    student, teacher = (F.normalize(flat @ flat.T) for flat in flattened)
    return (teacher - student).square().mean()


class SimilarityPreserving(FeatureLoss):
    """Cross-entropy + weight * similarity_preserving_loss of the last map, over the global batch.

    Memory with several processes: each stores the global batch's maps, B * c * h * w numbers.
    """

    config: SPConfig
    compares_images = True

    @classmethod
    def default_layers(cls, config: SPConfig, stages: Stages) -> tuple[str, ...]:
        return stages.maps[-1:]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        pairs = [
            (global_batch(student_map), global_batch(teacher_map))
            for student_map, teacher_map in pair_layers(student, teacher)
        ]
        term = sum(similarity_preserving_loss(*maps) for maps in pairs)
        return self.common_terms(student, teacher, batch) | {"sp": self.config.weight * term}
