"""SimKD (Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", arXiv:2203.14001)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kd.config.methods import SimKDConfig
from kd.errors import require
from kd.losses.features import FeatureLoss, pair_layers, pool_to, probed_maps
from kd.losses.fitnet import hint_loss
from kd.models.features import Tap
from kd.types import Batch, Outputs, Pair, Stages

NARROWING = 2  # the projector is this much narrower than the teacher's map inside; the authors' choice


class Projector(nn.Sequential):
    """From the student's map to the teacher's: 1 x 1, 3 x 3 and 1 x 1 convolutions."""

    def __init__(self, channels_in: int, channels: int):
        inside = max(channels // NARROWING, 1)
        layers = []
        for width_in, width, kernel in ((channels_in, inside, 1), (inside, inside, 3), (inside, channels, 1)):
            convolution = nn.Conv2d(width_in, width, kernel, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers)


class Reused(nn.Module):
    """The student up to its last map, a projector, and a classifier of the teacher's shape, never trained."""

    def __init__(self, student: nn.Module, recipe: dict):
        super().__init__()
        self.student = student
        student.set_submodule(recipe["student_classifier"], nn.Identity())  # nobody asks it
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
    """weight * the mean square between the projected and the teacher's last map.

    There is no cross-entropy: the teacher's classifier stays as it is. What is scored, saved and exported is student,
    projector and classifier, and their parameters are counted.
    """

    config: SimKDConfig
    has_cross_entropy = False

    @classmethod
    def wanted(cls, config: SimKDConfig, stages: Stages) -> tuple[str, ...]:
        return stages.maps[-1:]

    def __init__(self, config: SimKDConfig, pair: Pair):
        super().__init__(config, pair)
        ((ours, theirs),) = probed_maps(pair, only_one=True)
        known = pair.head is not None and pair.student_stages.classifier is not None
        require(known, "simkd reuses the classifier, and a network here ends in no linear layer over the classes")
        _check_classes(pair, theirs)
        _check_pooled(pair, theirs)
        self._head = {name: tensor.clone() for name, tensor in pair.head.state_dict().items()}
        self.recipe = {
            "method": "simkd",
            "layer": self.student_layers[0],
            "student_classifier": pair.student_stages.classifier,
            "channels": [ours.shape[1], theirs.shape[1]],
            "pool": list(theirs.shape[2:]) if ours.shape[2] > theirs.shape[2] else None,
            "classes": pair.head.out_features,
            "bias": pair.head.bias is not None,
        }
        self.student_layers = ("projector",)  # of the deployed network

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        ((ours, theirs),) = pair_layers(student, teacher)
        term = hint_loss(ours, pool_to(theirs, ours.shape[2:]))
        terms = self.usual_terms(student, teacher, batch) | {"simkd": self.config.weight * term}
        del terms["ce"]
        return terms

    def deployed(self, student: nn.Module) -> nn.Module:
        network = Reused(student, self.recipe)
        network.classifier.load_state_dict(self._head)
        return network

    @classmethod
    def rebuild(cls, student: nn.Module, recipe: dict) -> nn.Module:
        return Reused(student, recipe)


def _check_classes(pair: Pair, teacher_map: Float[Tensor, "b c h w"]) -> None:
    """The reused classifier has the teacher's classes, which are matched with the data's only behind it."""
    known, wanted = pair.head.out_features, pair.teacher.logits.shape[1]
    require(
        known == wanted, f"simkd reuses the teacher's classifier over its {known} classes, and the data has {wanted}"
    )
    pooled = teacher_map.mean(dim=(2, 3))
    if pooled.shape[1] != pair.head.in_features:
        return  # not what it takes, which _check_pooled says
    raw = pair.head(pooled)
    moved = torch.allclose(raw.sort(dim=1).values, pair.teacher.logits.sort(dim=1).values, rtol=1e-3, atol=1e-3)
    same = torch.allclose(raw, pair.teacher.logits, rtol=1e-3, atol=1e-3)
    require(
        same or not moved, "simkd reuses the teacher's classifier, whose classes are in another order than the data's"
    )


def _check_pooled(pair: Pair, teacher_map: Float[Tensor, "b c h w"]) -> None:
    pooled = teacher_map.mean(dim=(2, 3))
    fits = pooled.shape[1] == pair.head.in_features
    require(
        fits and torch.allclose(pair.head(pooled), pair.teacher.logits, rtol=1e-3, atol=1e-3),
        f"simkd: {pair.teacher_stages.classifier} of the teacher does not take the average of"
        f" {', '.join(pair.teacher.features)}: --teacher-layers names the map that is pooled into it",
    )
