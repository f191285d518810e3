"""Relational knowledge distillation (Park et al., arXiv:1904.05068)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.config.methods import RKDConfig
from kd.losses.base import global_batch
from kd.losses.features import FeatureLoss, check_batches, embeddings, probed_embeddings
from kd.types import Batch, Outputs, Pair, Stages


def rkd_loss(
    student_embedding: Float[Tensor, "b d"],
    teacher_embedding: Float[Tensor, "b e"],
    distance_weight: float,
    angle_weight: float,
) -> Float[Tensor, ""]:
    """Huber loss of the distances in pairs and of the angles in triples of samples (section 3.2).

    Distances are divided by their mean over pairs. Finite for equal embeddings. Memory for each network: b * b * d for
    the differences and b^3 for the angles, about 4 MB and 1 MB at b = 64, 256 MB and 512 MB at b = 512 (d = 256).
    Raises ValueError if the batches differ.
    """
    check_batches(student_embedding, teacher_embedding)
    distances, angles = zip(*(_relations(embedding) for embedding in (student_embedding, teacher_embedding)))
    return distance_weight * F.smooth_l1_loss(*distances) + angle_weight * F.smooth_l1_loss(*angles)


def _relations(embedding: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b b"], Float[Tensor, "b b b"]]:
    """Distances between samples, and cosines of the angles at each sample between any two others."""
    differences = embedding[None] - embedding[:, None]
    distances = differences.norm(dim=2)
    pairs = max(len(embedding) * (len(embedding) - 1), 1)  # without those of a sample with itself
    units = F.normalize(differences, dim=2)
    return distances / (distances.sum() / pairs).clamp_min(1e-12), units @ units.transpose(1, 2)


class RKD(FeatureLoss):
    """Cross-entropy + weight * rkd_loss of the pooled embeddings, over the global batch."""

    config: RKDConfig
    compares_images = True

    @classmethod
    def default_layers(cls, config: RKDConfig, stages: Stages) -> tuple[str, ...]:
        return stages.embedding

    def __init__(self, config: RKDConfig, pair: Pair):
        super().__init__(config, pair)
        probed_embeddings(pair)  # raises unless there is one layer of each

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        batches = (global_batch(embedding) for embedding in embeddings(student, teacher))
        term = rkd_loss(*batches, self.config.distance_weight, self.config.angle_weight)
        return self.common_terms(student, teacher, batch) | {"rkd": self.config.weight * term}
