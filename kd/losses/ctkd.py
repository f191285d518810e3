"""Curriculum temperature (Li et al., "Curriculum Temperature for Knowledge Distillation", arXiv:2211.16231)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.config.methods import CTKDConfig
from kd.losses.base import DistillationLoss
from kd.losses.kd import kd_loss, logits_of, soft_logits
from kd.types import Batch, Outputs, Pair


def reverse_gradient(value: Float[Tensor, "*size"], strength: Float[Tensor, ""]) -> Float[Tensor, "*size"]:
    """`value` itself, whose gradient is multiplied by -strength on the way back."""
    return value.detach() - strength * (value - value.detach())


class LearnedTemperature(nn.Module):
    """A temperature between two bounds, learned to make the student's task harder: the global one of section 3.2.

    lowest + (highest - lowest) * sigmoid(theta), theta from 1: 15.6 for 1 to 21. Its gradient is reversed with a
    strength that rises from 0 to 1 by a cosine over `epochs`, so that the task gets harder only by and by.
    """

    def __init__(self, lowest: float, highest: float, epochs: float):
        super().__init__()
        self.lowest, self.highest, self.epochs = lowest, highest, epochs
        self.theta = nn.Parameter(torch.ones(()))  # trained, saved and synchronised with the student

    def strength(self, epoch: Int[Tensor, ""]) -> Float[Tensor, ""]:
        """(1 - cos(pi * epoch / epochs)) / 2, the epoch counted from 1 as in the authors' code; stays on the device."""
        share = ((epoch + 1) / max(self.epochs, 1e-9)).clamp(max=1)
        return (1 - (math.pi * share).cos()) / 2

    def forward(self, epoch: Int[Tensor, ""]) -> Float[Tensor, ""]:
        return self._bounded(reverse_gradient(self.theta, self.strength(epoch)))

    @property
    def value(self) -> Float[Tensor, ""]:
        """Without a gradient."""
        return self._bounded(self.theta.detach())

    def _bounded(self, theta: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return self.lowest + (self.highest - self.lowest) * theta.sigmoid()


class CTKD(DistillationLoss):
    """(1 - alpha) * cross-entropy + alpha * kd_loss at the learned temperature, T^2 included in its gradient."""

    config: CTKDConfig

    def __init__(self, config: CTKDConfig, pair: Pair):
        super().__init__(config, pair)
        self.temperature = LearnedTemperature(
            config.lowest_temperature, config.highest_temperature, config.decay_epochs
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        alpha, logits = self.config.alpha, logits_of(self.config, student, teacher)
        return {
            **self.hard_labels_term(batch, student.logits, weight=1 - alpha),
            "ctkd": alpha * kd_loss(*logits, self.temperature(batch.epoch)),
        }

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        return soft_logits(self.config, teacher, self.temperature.value)
