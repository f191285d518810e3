"""Logit standardisation (Sun et al., "Logit Standardization in Knowledge Distillation", arXiv:2403.01427)."""

from jaxtyping import Float
from torch import Tensor

from kd.methods.flags import LogitFlags
from kd.outputs import Outputs


def standardize(logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Each row to mean 0 and deviation 1: only the order and the ratios of gaps are left to copy.

    (z - mean) / (1e-7 + std), with the unbiased deviation, as the authors' code computes it. Equal logits give 0, with
    a gradient of 0 in std (torch's own is not finite there).
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (1e-7 + logits.var(dim=1, keepdim=True).clamp_min(1e-24).sqrt())


def logits_of(
    config: LogitFlags, student: Outputs, teacher: Outputs
) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Both networks' logits, standardised where --standardize asks."""
    if config.standardize:
        return standardize(student.logits), standardize(teacher.logits)
    return student.logits, teacher.logits


def softened(config: LogitFlags, teacher: Outputs, temperature: float) -> Float[Tensor, "b k"]:
    """The teacher's logits as a method compares them."""
    return (standardize(teacher.logits) if config.standardize else teacher.logits) / temperature
