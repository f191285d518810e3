"""What the methods' flags have in common, and how their values are checked."""

import math
from dataclasses import dataclass
from typing import ClassVar

from kd.errors import require


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0 and math.isfinite(value), f"{_flag(name)} {value}: give a number above 0")


def not_negative(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0 and math.isfinite(value), f"{_flag(name)} {value}: give 0 or more")


def share(config, name: str) -> None:
    value = getattr(config, name)
    require(0 <= value <= 1, f"{_flag(name)} {value}: give a share from 0 to 1")


@dataclass(frozen=True)
class MethodFlags:
    """What scripts ask of a method before anything slow is imported."""

    needs_teacher: ClassVar[bool] = True


@dataclass(frozen=True)
class LogitFlags(MethodFlags):
    """What every method of logits takes."""

    standardize: bool = False
    """First bring both networks' logits to mean 0 and deviation 1 per sample (arXiv:2403.01427)."""


@dataclass(frozen=True)
class FeatureFlags(MethodFlags):
    """What every method of features takes."""

    weight: float = 1.0
    """Of the method's own term."""
    student_layers: tuple[str, ...] = ()
    """Dotted names of the student's modules (or NAME.input); left out: the stages that its model names."""
    teacher_layers: tuple[str, ...] = ()
    """The teacher's, paired with the student's in order."""
    kd_weight: float = 0.0
    """Adds plain kd with this weight, as the literature's combinations do."""
    kd_temperature: float = 4.0
    """Of that kd."""

    def check(self) -> None:
        not_negative(self, "weight", "kd_weight")
        positive(self, "kd_temperature")
