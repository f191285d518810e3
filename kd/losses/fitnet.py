"""FitNets (Romero et al., "Hints for Thin Deep Nets", arXiv:1412.6550)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.config.methods import FitNetConfig
from kd.errors import require
from kd.losses.features import FeatureLoss, pair_layers, probed_maps, same_size
from kd.types import Batch, Outputs, Pair, Stages


def hint_loss(student_map: Float[Tensor, "b c h w"], teacher_map: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Mean squared difference over all elements (section 2.2)."""
    return F.mse_loss(student_map, teacher_map)


class FitNet(FeatureLoss):
    """Cross-entropy + weight * hint_loss of one middle stage, after a regressor (1 x 1 convolution, BatchNorm, ReLU).

    Differs from the paper: both terms are trained together instead of the hint first, as in the literature's
    comparisons (arXiv:1910.10699). Maps of different sizes are average-pooled to the smaller one, so that the
    regressor stays 1 x 1.
    """

    config: FitNetConfig

    @classmethod
    def default_layers(cls, config: FitNetConfig, stages: Stages) -> tuple[str, ...]:
        count = len(stages.maps)
        require(
            config.hint_stage <= count or not count,
            f"--hint-stage {config.hint_stage}: there are {count} stages; give 1 to {count}",
        )
        return stages.maps[config.hint_stage - 1 : config.hint_stage]

    def __init__(self, config: FitNetConfig, pair: Pair):
        super().__init__(config, pair)
        ((student, teacher),) = probed_maps(pair, only_one=True)
        channels = teacher.shape[1]
        self.regressor = nn.Sequential(nn.Conv2d(student.shape[1], channels, 1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        ((student_map, teacher_map),) = pair_layers(student, teacher)
        student_map, teacher_map = same_size(student_map, teacher_map)
        term = hint_loss(self.regressor(student_map), teacher_map)
        return self.common_terms(student, teacher, batch) | {"fitnet": self.config.weight * term}
