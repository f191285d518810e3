"""One paper a file: the pure function of tensors first, then the module that wires it."""

from kd.losses.base import DistillationLoss, Distiller, cross_entropy
from kd.losses.kd import KD, kd_loss
from kd.losses.none import CrossEntropy

LOSSES = {"none": CrossEntropy, "kd": KD}

__all__ = ["KD", "LOSSES", "CrossEntropy", "DistillationLoss", "Distiller", "cross_entropy", "kd_loss"]
