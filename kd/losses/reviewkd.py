"""Distillation by knowledge review (Chen et al., arXiv:2104.09044)."""

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

WIDEST = 512  # channels inside the fusion modules


def hierarchical_context_loss(
    student_map: Float[Tensor, "b c h w"], teacher_map: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    """Mean square of the maps and of their average pools to 4 x 4, 2 x 2 and 1 x 1 (the paper's "HCL").

    A weighted mean, each pool with half the weight of the one before; pools that are no smaller than the map are left
    out.
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
    """A stage with what came from deeper ones, weighed by attention (the paper's "ABF")."""

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
        """What is compared with the teacher's map of `size`, and what the next shallower stage gets."""
        fused = self.narrow(stage)
        if self.attention is not None:
            deeper = F.interpolate(deeper, fused.shape[2:])
            share = self.attention(torch.cat([fused, deeper], dim=1))
            fused = fused * share[:, :1] + deeper * share[:, 1:]
        if fused.shape[2:] == size:
            return self.out(fused), fused
        return self.out(F.interpolate(fused, size)), fused


class ReviewKD(FeatureLoss):
    """Cross-entropy + weight * hierarchical_context_loss over all stages and the embedding, rising over 20 epochs.

    Differs from the authors' code: maps are taken after the stage's last ReLU, where theirs are before it.
    """

    config: ReviewKDConfig

    @classmethod
    def wanted(cls, config: ReviewKDConfig, stages: Stages) -> tuple[str, ...]:
        return (*stages.maps, *stages.embedding) if stages.maps else ()

    def __init__(self, config: ReviewKDConfig, pair: Pair):
        super().__init__(config, pair)
        students, teachers = (deepest_first(part) for part in (pair.student, pair.teacher))
        channels = min(WIDEST, students[0].shape[1])
        sizes = [(ours.shape[1], theirs.shape[1]) for ours, theirs in zip(students, teachers)]
        self.fusions = nn.ModuleList(
            Fusion(ours, channels, theirs, fuses=depth > 0) for depth, (ours, theirs) in enumerate(sizes)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        term, carried = student.logits.new_zeros(()), None
        for fusion, ours, theirs in zip(self.fusions, deepest_first(student), deepest_first(teacher)):
            predicted, carried = fusion(ours, carried, theirs.shape[2:])
            term = term + hierarchical_context_loss(predicted, theirs)
        weight = self.config.weight * ramp(batch.epoch, self.config.ramp_epochs)
        return self.usual_terms(student, teacher, batch) | {"reviewkd": weight * term}


def deepest_first(outputs: Outputs) -> list[Float[Tensor, "b c h w"]]:
    """All features as maps; an embedding is one of 1 x 1."""
    features = [part[:, :, None, None] if part.ndim == 2 else part for part in outputs.features.values()]
    shapes = [tuple(part.shape) for part in features]
    require(all(len(shape) == 4 for shape in shapes), f"reviewkd compares maps, b x c x h x w; given are {shapes}")
    return features[::-1]
