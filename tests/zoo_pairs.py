"""Pairs of zoo networks in which every number follows from a seed.

The authors' networks were given the same weights, in the same order, and their code the resulting features: its losses
are in tests/losses/authors_pairs.json.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kd.config import METHODS
from kd.losses import DistillationLoss, loss_class
from kd.models import build_model, probe, stages
from kd.models.features import Tap
from kd.types import Batch, Outputs, Pair

SIZE, CLASSES, BATCH = (32, 32), 10, 4
SAMPLES, NEGATIVES = 24, 7  # for crd
STUDENT_SEED, TEACHER_SEED, METHOD_SEED, IMAGE_SEED = 1, 2, 3, 4

# Weight 1, so that the term is the authors' loss alone.
FLAGS = {
    "at": {"weight": 1.0},
    "sp": {"weight": 1.0},
    "nst": {"weight": 1.0},
    "pkt": {"weight": 1.0},
    "rkd": {"weight": 1.0},
    "vid": {"weight": 1.0},
    "reviewkd": {"weight": 1.0},
    "crd": {"weight": 1.0, "width": 8, "negatives": NEGATIVES},
    "simkd": {"weight": 1.0},
}


def draws(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers. NumPy promises that this generator's never change (NEP 19)."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def fill(module: nn.Module, seed: int) -> None:
    """Give every weight and statistic of the module a number of its own, of the usual size."""
    for place, (key, tensor) in enumerate(module.state_dict().items()):
        if not tensor.is_floating_point() or key.startswith("cross_entropy") or key == "normalizers":
            continue
        number = draws(1000 * seed + place, *tensor.shape)
        if key == "banks":
            number = nn.functional.normalize(number, dim=2)
        elif tensor.ndim > 1:
            number = number * (2 / tensor[0].numel()) ** 0.5
        else:
            number = 0.1 * number.abs() + 1 if key.endswith(("weight", "var", "spread")) else 0.1 * number
        tensor.copy_(number)


def zoo_network(name: str, seed: int) -> nn.Module:
    network = build_model(name, CLASSES, SIZE)
    fill(network, seed)
    return network


def batch() -> Batch:
    image, index = draws(IMAGE_SEED, BATCH, 3, *SIZE), torch.tensor([5, 0, 23, 11])
    return Batch(image, index % CLASSES, index, *[torch.tensor(50)] * 3)  # an epoch in which no ramp is left


class Given(nn.Module):
    """In place of crd's own draw of negatives."""

    def forward(self, batch: Batch) -> Tensor:
        return (batch.index[:, None] + 1 + 3 * torch.arange(NEGATIVES)) % SAMPLES


@cache
def zoo_teacher(name: str) -> nn.Module:
    """In eval mode, with BatchNorm's statistics those of the batch, so that no depth makes the maps explode."""
    network = zoo_network(name, TEACHER_SEED).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(batch().image)
    return network.eval().requires_grad_(False)


@cache
def teacher_outputs(name: str, layers: tuple[str, ...]) -> Outputs:
    tap = Tap(zoo_teacher(name), layers)
    outputs = tap(batch().image)
    tap.remove()
    return outputs


class Method(NamedTuple):
    """A method on a pair, in float64, and its student in training mode."""

    network: nn.Module  # the deployed one
    loss: DistillationLoss
    teacher: str

    def step(self) -> tuple[Outputs, Tensor]:
        """The student's outputs and the method's term for the batch, after a backward pass of the term."""
        outputs = Tap(self.network, self.loss.student_layers)(batch().image)
        terms = self.loss(outputs, teacher_outputs(self.teacher, self.loss.teacher_layers), batch())
        (term,) = (value for name, value in terms.items() if name != "ce")
        term.backward()
        return outputs, term


def build(method: str, student_name: str, teacher_name: str, **flags) -> Method:
    """The method on the pair, with the layers that it takes if `flags` name none."""
    student, teacher = zoo_network(student_name, STUDENT_SEED), zoo_teacher(teacher_name)
    config, kind = METHODS[method](**FLAGS[method], **flags), loss_class(METHODS[method])
    student_stages, teacher_stages = stages(student_name, student, CLASSES), stages(teacher_name, teacher, CLASSES)
    layers = kind.layers(config, student_stages, teacher_stages)
    probed = probe(student, SIZE, student_name, layers[0]), teacher_outputs(teacher_name, layers[1])
    head, labels = teacher.get_submodule(teacher_stages.classifier), torch.arange(SAMPLES) % CLASSES
    loss = kind(config, Pair(*probed, labels, student_stages, teacher_stages, head))
    if method == "crd":
        loss.negatives = Given()
    network = loss.deployed(student)
    fill(loss if network is student else network.projector, METHOD_SEED)
    return Method(network.double().train(), loss.double().train(), teacher_name)


def gradient_norms(method: Method) -> dict[str, float]:
    """Of the student's first convolution, of all of the student, and of the method's own parameters."""
    own = list(method.loss.parameters())
    if hasattr(method.network, "projector"):
        own += list(method.network.projector.parameters())
    student = [p for p in method.network.parameters() if not any(p is other for other in own)]
    first = next(module for module in method.network.modules() if isinstance(module, nn.Conv2d)).weight
    return {"first gradient": norm([first]), "student gradient": norm(student), "method gradient": norm(own)}


def norm(parameters: list[Tensor]) -> float:
    return sum(p.grad.square().sum() for p in parameters if p.grad is not None).sqrt().item() if parameters else 0.0
