"""Neuron selectivity transfer (Huang & Wang, "Like What You Like", arXiv:1707.01219)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.config.methods import NSTConfig
from kd.losses.features import FeatureLoss, check_batches, pair_layers, probed_maps, same_size
from kd.types import Batch, Outputs, Pair, Stages


def nst_loss(student_map: Float[Tensor, "b c h w"], teacher_map: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, ""]:
    """Squared maximum mean discrepancy between the channels' maps, with the kernel (x . y)^2.

    Each channel's map is flattened and scaled to length 1; the kernel is averaged over pairs of channels and the batch.
    Maps of different sizes are average-pooled to the smaller one. Memory: b * (c + c2)^2 numbers, 64 MB for 512
    channels at b = 64. Raises ValueError if the batches differ.
    """
    check_batches(student_map, teacher_map)
    pooled = same_size(student_map, teacher_map)
    student, teacher = (F.normalize(feature_map.flatten(2), dim=2) for feature_map in pooled)
    return _kernel(teacher, teacher) + _kernel(student, student) - 2 * _kernel(student, teacher)


def _kernel(one: Float[Tensor, "b c n"], other: Float[Tensor, "b c2 n"]) -> Float[Tensor, ""]:
    return (one @ other.transpose(1, 2)).square().mean()


class NeuronSelectivity(FeatureLoss):
    """Cross-entropy + weight * nst_loss, summed over stages."""

    config: NSTConfig

    @classmethod
    def default_layers(cls, config: NSTConfig, stages: Stages) -> tuple[str, ...]:
        return stages.maps

    def __init__(self, config: NSTConfig, pair: Pair):
        super().__init__(config, pair)
        probed_maps(pair)  # raises if a layer outputs no map

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        term = sum(nst_loss(*maps) for maps in pair_layers(student, teacher))
        return self.common_terms(student, teacher, batch) | {"nst": self.config.weight * term}
