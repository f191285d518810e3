"""ReviewKD (Chen et al., "Distilling Knowledge via Knowledge Review", arXiv:2104.09044)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.config.methods import ReviewKDConfig
from kd.errors import require
from kd.losses.base import ramp
from kd.losses.features import FeatureLoss, pool_to
from kd.types import Batch, Outputs, Pair, Stages

MAX_CHANNELS = 512  # inside the fusion modules


def hierarchical_context_loss(
    student_map: Float[Tensor, "b c h w"], teacher_map: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    """Mean squared difference of the maps and of their average pools to 4 x 4, 2 x 2 and 1 x 1 (the paper's "HCL").

    A weighted mean: each pool has half the weight of the one before. Pools not smaller than the map are left out.
    """
    total, weights = F.mse_loss(student_map, teacher_map), 1.0
    weight = 1.0
    for side in (4, 2, 1):
        if side < min(student_map.shape[2:]):
            weight /= 2
            pooled = (pool_to(part, (side, side)) for part in (student_map, teacher_map))
            total = total + weight * F.mse_loss(*pooled)
            weights += weight
    return total / weights


class Fusion(nn.Module):
    """Fuses a stage with the result of the deeper stages, weighted by attention (the paper's "ABF")."""

    def __init__(self, channels_in: int, channels: int, channels_out: int, fuses: bool):
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.out = nn.Sequential(
            nn.Conv2d(channels, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out)
        )
        self.attention = nn.Sequential(nn.Conv2d(2 * channels, 2, 1), nn.Sigmoid()) if fuses else None
        for convolution in (self.narrow[0], self.out[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(
        self, stage: Float[Tensor, "b c h w"], deeper: Float[Tensor, "b m h2 w2"] | None, size: Sequence[int]
    ) -> tuple[Float[Tensor, "b c3 h3 w3"], Float[Tensor, "b m h w"]]:
        """The map to compare with the teacher's of `size`, and the input of the next shallower stage's fusion."""
        fused = self.narrow(stage)
        if self.attention is not None:
            deeper = F.interpolate(deeper, fused.shape[2:])
            share = self.attention(torch.cat([fused, deeper], dim=1))
            fused = fused * share[:, :1] + deeper * share[:, 1:]
        if fused.shape[2:] == size:
            return self.out(fused), fused
        return self.out(F.interpolate(fused, size)), fused


class ReviewKD(FeatureLoss):
    """Cross-entropy + weight * hierarchical_context_loss, summed over all stages and the embedding.

    As in the authors' code, the teacher's maps are taken before the ReLU that ends a stage, the student's after it.
    The weight rises linearly over the first epochs. Differs from the authors' code: counts them from 1, as dkd's
    authors do, so that the first epoch has a twentieth of the weight and not none; and where a student's map is larger
    than the teacher's, passes it on as it is and not in the teacher's size.
    """

    config: ReviewKDConfig

    @classmethod
    def default_layers(cls, config: ReviewKDConfig, stages: Stages) -> tuple[str, ...]:
        return (*stages.maps, *stages.embedding) if stages.maps else ()

    @classmethod
    def default_teacher_layers(cls, config: ReviewKDConfig, stages: Stages) -> tuple[str, ...]:
        return (*stages.before_relu, *stages.embedding) if stages.before_relu else ()

    def __init__(self, config: ReviewKDConfig, pair: Pair):
        super().__init__(config.settled(""), pair)
        student_maps, teacher_maps = map(_deepest_first, (pair.student, pair.teacher))
        channels = min(MAX_CHANNELS, student_maps[0].shape[1])
        self.fusions = nn.ModuleList(
            Fusion(student_map.shape[1], channels, teacher_map.shape[1], fuses=depth > 0)
            for depth, (student_map, teacher_map) in enumerate(zip(student_maps, teacher_maps, strict=True))
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        term, deeper = student.logits.new_zeros(()), None
        maps = zip(self.fusions, _deepest_first(student), _deepest_first(teacher), strict=True)
        for fusion, student_map, teacher_map in maps:
            predicted, deeper = fusion(student_map, deeper, teacher_map.shape[2:])
            term = term + hierarchical_context_loss(predicted, teacher_map)
        weight = self.config.weight * ramp(batch.epoch, self.config.ramp_epochs)
        return self.common_terms(student, teacher, batch) | {"reviewkd": weight * term}


def _deepest_first(outputs: Outputs) -> list[Float[Tensor, "b c h w"]]:
    """All features as maps; an embedding becomes a map of 1 x 1."""
    maps = [feature[:, :, None, None] if feature.ndim == 2 else feature for feature in outputs.features.values()]
    shapes = [tuple(feature_map.shape) for feature_map in maps]
    require(
        all(len(shape) == 4 for shape in shapes),
        f"reviewkd: compares maps, b x c x h x w, and these layers output {shapes}; name other layers",
    )
    return maps[::-1]
