"""Variational information distillation (Ahn et al., arXiv:1904.05835)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.config.methods import VIDConfig
from kd.losses.features import FeatureLoss, pair_layers, probed_maps, same_size
from kd.types import Batch, Outputs, Pair, Stages

EPS = 1e-5  # the smallest variance


def vid_loss(
    predicted_map: Float[Tensor, "b c h w"], teacher_map: Float[Tensor, "b c h w"], variance: Float[Tensor, "c"]
) -> Float[Tensor, ""]:
    """Mean of ((predicted - teacher)^2 / variance + log variance) / 2, constants aside.

    The negative log-likelihood of the teacher's map under a Gaussian around the student's prediction of it, with one
    variance a channel. May be negative.
    """
    variance = variance[:, None, None]
    return ((predicted_map - teacher_map).square() / variance + variance.log()).mean() / 2


class Predictor(nn.Module):
    """The teacher's map from the student's (three 1 x 1 convolutions), and how far off that is per channel."""

    def __init__(self, channels_in: int, channels: int, initial_variance: float):
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(channels_in, channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
        )
        # A parameter. Where it was kept in a plain list it was never trained and never saved.
        self.spread = nn.Parameter(torch.full((channels,), math.log(math.expm1(initial_variance - EPS))))

    def forward(self, student_map: Float[Tensor, "b c h w"], teacher_map: Float[Tensor, "b c2 h2 w2"]) -> Tensor:
        student_map, teacher_map = same_size(student_map, teacher_map)
        return vid_loss(self.mean(student_map), teacher_map, F.softplus(self.spread) + EPS)


class VID(FeatureLoss):
    """Cross-entropy + weight * vid_loss, summed over stages."""

    config: VIDConfig

    @classmethod
    def wanted(cls, config: VIDConfig, stages: Stages) -> tuple[str, ...]:
        return stages.maps

    def __init__(self, config: VIDConfig, pair: Pair):
        super().__init__(config, pair)
        sizes = [(ours.shape[1], theirs.shape[1]) for ours, theirs in probed_maps(pair)]
        self.predictors = nn.ModuleList(Predictor(*size, config.initial_variance) for size in sizes)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        term = sum(predictor(*maps) for predictor, maps in zip(self.predictors, pair_layers(student, teacher)))
        return self.usual_terms(student, teacher, batch) | {"vid": self.config.weight * term}
