"""Attention transfer (Zagoruyko & Komodakis, "Paying More Attention to Attention", arXiv:1612.03928)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.config.methods import ATConfig
from kd.losses.features import FeatureLoss, check_batches, pair_layers, probed_maps, same_size
from kd.types import Batch, Outputs, Pair, Stages


def attention_transfer_loss(
    student_map: Float[Tensor, "b c h w"], teacher_map: Float[Tensor, "b c2 h2 w2"]
) -> Float[Tensor, ""]:
    """Mean squared difference of two attention maps (section 3.1).

    An attention map is the mean over channels of the squared activations, flattened and scaled to length 1. Maps of
    different sizes are average-pooled to the smaller one. Differs from the paper: the mean square, as in the authors'
    code, instead of the norm. Raises ValueError if the batches differ.
    """
    check_batches(student_map, teacher_map)
    student, teacher = (_attention(feature_map) for feature_map in same_size(student_map, teacher_map))
    return (student - teacher).square().mean()


def _attention(feature_map: Float[Tensor, "b c h w"]) -> Float[Tensor, "b hw"]:
    return F.normalize(feature_map.square().mean(dim=1).flatten(1))


class AttentionTransfer(FeatureLoss):
    """Cross-entropy + weight * attention_transfer_loss, summed over stages."""

    config: ATConfig

    @classmethod
    def default_layers(cls, config: ATConfig, stages: Stages) -> tuple[str, ...]:
        return stages.maps

    def __init__(self, config: ATConfig, pair: Pair):
        super().__init__(config, pair)
        probed_maps(pair)  # raises if a layer outputs no map

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        term = sum(attention_transfer_loss(*maps) for maps in pair_layers(student, teacher))
        return self.common_terms(student, teacher, batch) | {"at": self.config.weight * term}
