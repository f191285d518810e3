"""DeiT (Touvron et al., "Training data-efficient image transformers", arXiv:2012.12877).

The student answers twice: one head learns the labels, the other follows the teacher. The prediction is their mean.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.config.methods import DeiTConfig
from kd.errors import require
from kd.losses.base import DistillationLoss
from kd.losses.kd import check_shapes, kd_loss
from kd.models.features import Tap
from kd.types import Batch, Outputs, Pair, Stages

HEAD = "distillation_head"  # in TwoHeads

ALPHA = {"hard": 0.5, "soft": 0.1}  # the paper's, section 4


def deit_loss(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    kind: Literal["hard", "soft"] = "hard",
    temperature: float = 3.0,
) -> Float[Tensor, ""]:
    """The distillation head's loss (section 4).

    hard: cross-entropy with the class that the teacher thinks likeliest. soft: T^2 * KL(teacher || student) between
    softened predictions; of a mixed image, too, the teacher's own answer counts.
    Differs from the authors' code: that one divides the soft loss by the number of classes as well, which the paper
    does not. Raises ValueError if the shapes differ.
    """
    check_shapes(student_logits, teacher_logits)
    if kind == "soft":
        return kd_loss(student_logits, teacher_logits, temperature)
    return F.cross_entropy(student_logits, teacher_logits.argmax(dim=1))


class TwoHeads(nn.Module):
    """A student and a second linear layer over the classes beside its own; answers the mean of both."""

    def __init__(self, student: nn.Module, recipe: dict):
        super().__init__()
        self.student = student
        self.tap = Tap(student, (recipe["embedding"],))
        self.distillation_head = nn.Linear(recipe["width"], recipe["classes"])

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        outputs = self.tap(image)
        (embedding,) = outputs.features.values()
        return (outputs.logits + self.distillation_head(embedding)) / 2


class DeiT(DistillationLoss):
    """(1 - alpha) * cross-entropy of the class head + alpha * deit_loss of the distillation head.

    A network of timm that has both heads (deit_*_distilled, LeViT, EfficientFormer, ...) is trained as it is. Any other
    gets a second linear layer on the input of its last one; it is then scored, saved, exported and counted with it.
    """

    config: DeiTConfig

    @classmethod
    def layers(cls, config: DeiTConfig, student: Stages, teacher: Stages | None) -> tuple[tuple[str, ...], tuple]:
        require(
            student.classifier is not None,
            "deit: the student ends in no linear layer over the classes, beside which a second could stand; choose"
            " another method",
        )
        return student.heads or student.embedding, ()

    def __init__(self, config: DeiTConfig, pair: Pair):
        super().__init__(config, pair)
        logits, features = pair.student.logits, pair.student.features
        if pair.student_stages.heads:
            heads = list(features.values())
            require(
                heads[0].shape == logits.shape and torch.allclose(sum(heads) / 2, logits, rtol=1e-3, atol=1e-3),
                f"deit: the student does not answer the mean of {' and '.join(features)}; choose another method",
            )
            return
        ((layer, embedding),) = features.items()
        require(
            embedding.ndim == 2,
            f"deit: {layer} is {tuple(embedding.shape)} for two images, not one vector each; choose another method",
        )
        self.recipe = {
            "method": "deit",
            "embedding": layer,
            "width": embedding.shape[1],
            "classes": logits.shape[1],
        }
        self.student_layers = ("student", HEAD)  # now the deployed network's

    @property
    def alpha(self) -> float:
        return self.config.alpha if self.config.alpha is not None else ALPHA[self.config.kind]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        class_logits, distilled_logits = student.features.values()
        term = deit_loss(distilled_logits, teacher.logits, self.config.kind, self.config.temperature)
        return {"ce": (1 - self.alpha) * self.cross_entropy(class_logits, batch), "deit": self.alpha * term}

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"] | None:
        return teacher.logits / self.config.temperature if self.config.kind == "soft" else None

    def deployed(self, student: nn.Module) -> nn.Module:
        return TwoHeads(student, self.recipe) if self.recipe else student

    @classmethod
    def rebuild(cls, student: nn.Module, recipe: dict) -> nn.Module:
        return TwoHeads(student, recipe)
