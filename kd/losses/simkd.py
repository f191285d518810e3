"""SimKD (Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", arXiv:2203.14001).

Its loss is `hint_loss` (fitnet.py). New here is the deployed network: the student, a projector and the teacher's
classifier.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kd.config.methods import SimKDConfig
from kd.errors import require
from kd.losses.features import FeatureLoss, pair_layers, pool_to, probed_maps
from kd.losses.fitnet import hint_loss
from kd.models.features import Tap
from kd.types import Batch, Outputs, Pair, Stages

NARROWING = 2  # teacher's channels / channels inside the projector; the authors' choice


class Projector(nn.Sequential):
    """Predicts the teacher's map from the student's by 1 x 1, 3 x 3 and 1 x 1 convolutions."""

    def __init__(self, channels_in: int, channels: int):
        inside = max(channels // NARROWING, 1)
        layers = []
        for width_in, width, kernel in ((channels_in, inside, 1), (inside, inside, 3), (inside, channels, 1)):
            convolution = nn.Conv2d(width_in, width, kernel, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers)


class StudentWithTeacherClassifier(nn.Module):
    """The student up to its last map, a projector, and a frozen classifier of the teacher's shape."""

    def __init__(self, student: nn.Module, recipe: dict):
        super().__init__()
        self.student = student
        for layer in (*recipe.get("unused", ()), recipe["student_classifier"]):
            student.set_submodule(layer, nn.Identity())  # its output would not be used
        self.tap = Tap(student, (recipe["layer"],))
        self.size = recipe["pool"] and tuple(recipe["pool"])
        self.projector = Projector(*recipe["channels"])
        self.classifier = nn.Linear(recipe["channels"][1], recipe["classes"], bias=recipe["bias"])
        self.classifier.requires_grad_(False)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        (feature_map,) = self.tap(image).features.values()
        if self.size is not None:
            feature_map = pool_to(feature_map, self.size)
        return self.classifier(self.projector(feature_map).mean(dim=(2, 3)))


class SimKD(FeatureLoss):
    """weight * hint_loss between the projected student's last map and the one that the teacher pools.

    No cross-entropy, because the teacher's classifier is not trained. Student, projector and classifier are scored,
    saved, exported, and counted as parameters.
    """

    config: SimKDConfig
    has_cross_entropy = False

    @classmethod
    def default_layers(cls, config: SimKDConfig, stages: Stages) -> tuple[str, ...]:
        return stages.maps[-1:]

    @classmethod
    def default_teacher_layers(cls, config: SimKDConfig, stages: Stages) -> tuple[str, ...]:
        return (stages.pooled,) if stages.pooled else ()

    def __init__(self, config: SimKDConfig, pair: Pair):
        super().__init__(config, pair)
        ((student_map, teacher_map),) = probed_maps(pair, only_one=True)
        require(
            pair.head is not None and pair.student_stages.classifier is not None,
            "simkd: needs two networks that end in a linear layer over the classes; choose another method",
        )
        require(
            not pair.student_stages.heads,
            f"simkd: the student has {len(pair.student_stages.heads)} heads, and simkd needs one linear layer;"
            " choose another student or method",
        )
        _check_classes(pair, teacher_map)
        _check_pooled(pair, teacher_map)
        self._head = {name: tensor.clone() for name, tensor in pair.head.state_dict().items()}
        self.recipe = {
            "method": "simkd",
            "layer": self.student_layers[0],
            "student_classifier": pair.student_stages.classifier,
            "channels": [student_map.shape[1], teacher_map.shape[1]],
            "pool": list(teacher_map.shape[2:]) if student_map.shape[2] > teacher_map.shape[2] else None,
            "classes": pair.head.out_features,
            "bias": pair.head.bias is not None,
        } | _unused(pair.student_stages, self.student_layers[0])
        self.student_layers = ("projector",)  # now the deployed network's

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        ((student_map, teacher_map),) = pair_layers(student, teacher)
        term = hint_loss(student_map, pool_to(teacher_map, student_map.shape[2:]))
        terms = self.common_terms(student, teacher, batch) | {"simkd": self.config.weight * term}
        terms.pop("ce", None)
        return terms

    def deployed(self, student: nn.Module) -> nn.Module:
        network = StudentWithTeacherClassifier(student, self.recipe)
        network.classifier.load_state_dict(self._head)
        return network

    @classmethod
    def rebuild(cls, student: nn.Module, recipe: dict) -> nn.Module:
        return StudentWithTeacherClassifier(student, recipe)


def _unused(stages: Stages, layer: str) -> dict[str, list[str]]:
    """What comes between the student's last map and its classifier, if that map is the one projected."""
    unused = stages.pooled and stages.pooled != stages.maps[-1] == layer
    return {"unused": [stages.pooled]} if unused else {}


def _check_classes(pair: Pair, teacher_map: Float[Tensor, "b c h w"]) -> None:
    """Raise UserError unless the classifier has the data's classes in the data's order.

    The teacher's logits are matched with the data's classes only after its classifier.
    """
    head_classes, data_classes = pair.head.out_features, pair.teacher.logits.shape[1]
    require(
        head_classes == data_classes,
        f"simkd: reuses the teacher's classifier over its {head_classes} classes, and the data has {data_classes};"
        " choose another method or a teacher trained on this data",
    )
    pooled = teacher_map.mean(dim=(2, 3))
    if pooled.shape[1] != pair.head.in_features:
        return  # _check_pooled raises
    raw = pair.head(pooled)
    reordered = torch.allclose(raw.sort(dim=1).values, pair.teacher.logits.sort(dim=1).values, rtol=1e-3, atol=1e-3)
    same = torch.allclose(raw, pair.teacher.logits, rtol=1e-3, atol=1e-3)
    require(
        same or not reordered,
        "simkd: reuses the teacher's classifier, whose classes are in another order than the data's; choose another"
        " method or a teacher trained on this data",
    )


def _check_pooled(pair: Pair, teacher_map: Float[Tensor, "b c h w"]) -> None:
    """Raise UserError unless the classifier's input is the average over the teacher's map."""
    pooled = teacher_map.mean(dim=(2, 3))
    fits = pooled.shape[1] == pair.head.in_features
    require(
        fits and torch.allclose(pair.head(pooled), pair.teacher.logits, rtol=1e-3, atol=1e-3),
        f"simkd: the teacher's {pair.teacher_stages.classifier} does not take the average of"
        f" {', '.join(pair.teacher.features)}; name the map that is pooled into it with --teacher-layers,"
        " or choose another method",
    )
