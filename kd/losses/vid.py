"""Variational information distillation (Ahn et al., arXiv:1904.05835)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.config.methods import VID_EPS, VIDConfig
from kd.losses.features import FeatureLoss, pair_layers, probed_maps, same_size
from kd.types import Batch, Outputs, Pair, Stages


def vid_loss(
    predicted_map: Float[Tensor, "b c h w"], teacher_map: Float[Tensor, "b c h w"], variance: Float[Tensor, "c"]
) -> Float[Tensor, ""]:
    """Mean of ((predicted - teacher)^2 / variance + log variance) / 2.

    Up to a constant, the negative log-likelihood of the teacher's map under a Gaussian around the student's prediction,
    with one variance per channel. May be negative.
    """
    variance = variance[:, None, None]
    return ((predicted_map - teacher_map).square() / variance + variance.log()).mean() / 2


class Predictor(nn.Module):
    """Predicts the teacher's map from the student's (three 1 x 1 convolutions), with a variance per channel."""

    def __init__(self, channels_in: int, channels: int, initial_variance: float):
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(channels_in, channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
        )
        # Before softplus. A registered parameter: in a plain list it would be neither trained nor saved.
        self.spread = nn.Parameter(torch.full((channels,), math.log(math.expm1(initial_variance - VID_EPS))))

    def forward(self, student_map: Float[Tensor, "b c h w"], teacher_map: Float[Tensor, "b c2 h2 w2"]) -> Tensor:
        student_map, teacher_map = same_size(student_map, teacher_map)
        return vid_loss(self.mean(student_map), teacher_map, F.softplus(self.spread) + VID_EPS)


class VID(FeatureLoss):
    """Cross-entropy + weight * vid_loss, summed over stages."""

    config: VIDConfig

    @classmethod
    def default_layers(cls, config: VIDConfig, stages: Stages) -> tuple[str, ...]:
        return stages.maps

    def __init__(self, config: VIDConfig, pair: Pair):
        super().__init__(config, pair)
        self.predictors = nn.ModuleList(
            Predictor(student_map.shape[1], teacher_map.shape[1], config.initial_variance)
            for student_map, teacher_map in probed_maps(pair)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        term = sum(predictor(*maps) for predictor, maps in zip(self.predictors, pair_layers(student, teacher)))
        return self.common_terms(student, teacher, batch) | {"vid": self.config.weight * term}
