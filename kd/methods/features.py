"""Flags of the methods that compare features."""

from dataclasses import dataclass
from typing import Literal

from kd.errors import require
from kd.methods.flags import FeatureFlags, not_negative, positive


@dataclass(frozen=True)
class FitNetConfig(FeatureFlags):
    """Romero et al. 2015: one middle map, through a regressor."""

    weight: float = 100.0
    """Of the mean square."""
    hint_stage: int = 2
    """Which stage, counted from 1."""

    def check(self) -> None:
        super().check()
        require(self.hint_stage >= 1, f"--hint-stage {self.hint_stage}: give 1 or more")


@dataclass(frozen=True)
class ATConfig(FeatureFlags):
    """Zagoruyko & Komodakis 2017: where each stage is active, summed over channels."""

    weight: float = 1000.0
    """Of the mean squares, summed over stages."""


@dataclass(frozen=True)
class SPConfig(FeatureFlags):
    """Tung & Mori 2019: which samples of a batch are alike."""

    weight: float = 3000.0
    """Of the mean square between the two similarity matrices."""


@dataclass(frozen=True)
class NSTConfig(FeatureFlags):
    """Huang & Wang 2017: the distribution of each stage's channels."""

    weight: float = 50.0
    """Of the discrepancy, summed over stages."""


@dataclass(frozen=True)
class PKTConfig(FeatureFlags):
    """Passalis & Tefas 2018: the probability that samples are neighbours."""

    weight: float = 30000.0
    """Of the divergence."""


@dataclass(frozen=True)
class RKDConfig(FeatureFlags):
    """Park et al. 2019: distances and angles between a batch's embeddings."""

    distance_weight: float = 25.0
    """Of distances between pairs."""
    angle_weight: float = 50.0
    """Of angles in triples."""

    def check(self) -> None:
        super().check()
        not_negative(self, "distance_weight", "angle_weight")


@dataclass(frozen=True)
class VIDConfig(FeatureFlags):
    """Ahn et al. 2019: predict the teacher's maps with a learned variance."""

    initial_variance: float = 5.0
    """Of every channel, before training."""

    def check(self) -> None:
        super().check()
        positive(self, "initial_variance")


@dataclass(frozen=True)
class CCConfig(FeatureFlags):
    """Peng et al. 2019: the correlation between a batch's samples."""

    weight: float = 0.02
    """Of the term."""
    definition: Literal["neighbours", "paper"] = "neighbours"
    """paper: kernel matrices, as published; neighbours: what the code behind the literature's tables computes."""
    width: int = 128
    """Of both networks' learned embeddings, for neighbours."""

    def check(self) -> None:
        super().check()
        positive(self, "width")


@dataclass(frozen=True)
class CRDConfig(FeatureFlags):
    """Tian et al. 2020: tell the same sample from many others, across the two networks."""

    weight: float = 0.8
    """Of the two contrastive terms together."""
    width: int = 128
    """Of both networks' learned embeddings."""
    negatives: int = 16384
    """Samples of other classes to contrast each sample with."""
    contrast_temperature: float = 0.07
    """Divides the embeddings' products."""
    bank_momentum: float = 0.5
    """Share of a sample's old embedding that its new one keeps."""

    def check(self) -> None:
        super().check()
        positive(self, "width", "negatives", "contrast_temperature")
        require(0 <= self.bank_momentum < 1, f"--bank-momentum {self.bank_momentum}: give 0 or more, below 1")


@dataclass(frozen=True)
class ReviewKDConfig(FeatureFlags):
    """Chen et al. 2021: each stage learns from the teacher's earlier ones too."""

    weight: float = 1.0
    """Of the maps: 0.6 for resnet20, 1 for resnet32, 5 for WRN and resnet8x4."""
    ramp_epochs: float = 20.0
    """Epochs over which the term rises to full weight."""

    def check(self) -> None:
        super().check()
        not_negative(self, "ramp_epochs")


@dataclass(frozen=True)
class SimKDConfig(FeatureFlags):
    """Chen et al. 2022: reuse the teacher's classifier behind a projector. No cross-entropy."""
