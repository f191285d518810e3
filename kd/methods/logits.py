"""Flags of the methods that compare logits, and of those that need no teacher."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kd.errors import require
from kd.methods.flags import LogitFlags, MethodFlags, not_negative, positive, share


@dataclass(frozen=True)
class NoneConfig(MethodFlags):
    """Cross-entropy alone: no teacher."""

    needs_teacher: ClassVar[bool] = False
    label_smoothing: float = 0.0
    """Share of the target spread over all classes (arXiv:1512.00567)."""

    def check(self) -> None:
        require(0 <= self.label_smoothing < 1, f"--label-smoothing {self.label_smoothing}: give 0 or more, below 1")


@dataclass(frozen=True)
class KDConfig(LogitFlags):
    """Hinton et al. 2015: follow the teacher's softened predictions."""

    temperature: float = 5.0
    """Softens both distributions; larger reveals more of the wrong classes."""
    alpha: float = 0.7
    """Weight of the distillation term; cross-entropy has 1 - alpha."""
    boost: float = 1.0
    """Multiplies the distillation term. --standardize was published with temperature 2, alpha 0.9 and boost 10."""
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || student), the usual; reverse: KL(student || teacher), as the report's formula reads."""

    def check(self) -> None:
        positive(self, "temperature", "boost")
        share(self, "alpha")


@dataclass(frozen=True)
class MimicConfig(LogitFlags):
    """Ba & Caruana 2014: the teacher's logits themselves."""

    weight: float = 0.1
    """Of the mean square, beside cross-entropy."""

    def check(self) -> None:
        not_negative(self, "weight")


@dataclass(frozen=True)
class DKDConfig(LogitFlags):
    """Zhao et al. 2022: kd split into target and other classes, weighted apart."""

    temperature: float = 4.0
    """Softens both distributions."""
    alpha: float = 1.0
    """Weight of the target class against the rest."""
    beta: float = 8.0
    """Weight among the other classes: 2 for resnet56 or 110 to 20 or 32, 6 for WRN and VGG, 8 for the rest."""
    ramp_epochs: float = 20.0
    """Epochs over which the term rises to full weight."""

    def check(self) -> None:
        positive(self, "temperature")
        not_negative(self, "alpha", "beta", "ramp_epochs")


@dataclass(frozen=True)
class DISTConfig(LogitFlags):
    """Huang et al. 2022: correlate with the teacher, per sample and per class."""

    temperature: float = 4.0
    """Softens both distributions."""
    weight: float = 2.0
    """Of both terms together."""
    beta: float = 1.0
    """Weight of the rows: each sample over its classes."""
    gamma: float = 1.0
    """Weight of the columns: each class over the batch."""

    def check(self) -> None:
        positive(self, "temperature")
        not_negative(self, "weight", "beta", "gamma")


@dataclass(frozen=True)
class TFKDConfig(MethodFlags):
    """Yuan et al. 2020: a virtual teacher that is right; no network. A control: nearly label smoothing."""

    needs_teacher: ClassVar[bool] = False
    temperature: float = 20.0
    """Softens the virtual teacher."""
    alpha: float = 0.1
    """Weight of the virtual teacher; cross-entropy has 1 - alpha."""
    correct: float = 0.99
    """Its probability of the right class."""

    def check(self) -> None:
        positive(self, "temperature")
        share(self, "alpha")
        require(0 < self.correct < 1, f"--correct {self.correct}: give a share between 0 and 1")


@dataclass(frozen=True)
class ApprenticeConfig(MethodFlags):
    """Mishra & Marr 2017, scheme A: a teacher that is trained together with the student, from scratch."""

    needs_teacher: ClassVar[bool] = False
    partner: str | None = None
    """That teacher, always in full precision: names as for --student; left out: the student's own network."""
    alpha: float = 1.0
    """Weight of the teacher's cross-entropy with the labels."""
    beta: float = 0.5
    """Weight of the student's."""
    gamma: float = 0.5
    """Weight of the student's cross-entropy with the teacher's probabilities."""

    def check(self) -> None:
        not_negative(self, "alpha", "beta", "gamma")
