"""Small students and teachers for any method, without the scripts."""

import copy

import torch
from torch import Tensor, nn

from kd.config import named_method
from kd.losses import loss_class
from kd.losses.base import Distiller
from kd.models import probe
from kd.models.features import Tap
from kd.types import Batch, Outputs, Pair, Stages

STAGES = Stages(("0", "2"), "6", ("0", "1", "2", "3", "4", "5", "6"), pooled="2", before_relu=("0", "2"))
SIZE, CLASSES, SAMPLES = (12, 12), 5, 40
SMALL = {
    "crd": {"negatives": 16, "width": 8},
    "dkd": {"ramp_epochs": 2.0},
    "rld": {"ramp_epochs": 2.0},
    "cc": {"width": 8},
    "embed": {"queue": 24},
}
LABELS = torch.arange(SAMPLES) % CLASSES


def network(width: int) -> nn.Module:
    """Two maps and a linear layer, without normalisation; the ReLUs work in place, as is usual."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Identity(),
        nn.Linear(2 * width, CLASSES),
    )


def build(
    method: str, seed: int = 0, balance: str = "none", labels: Tensor | None = LABELS, **flags
) -> tuple[Distiller, Tap]:
    """A student with the method, and its teacher; `labels` None: on data without any."""
    torch.manual_seed(seed)
    student, teacher, kind = network(4), network(6).eval().requires_grad_(False), loss_class(named_method(method))
    config = named_method(method)(**small(method) | flags)
    config.check()
    names = kind.layers(config, STAGES, STAGES)
    outputs = [probe(part, SIZE, "test", layers) for part, layers in zip((student, teacher), names)]
    partner = copy.deepcopy(teacher).requires_grad_()
    known = labels is not None, SAMPLES
    loss = kind(config, Pair(*outputs, labels, STAGES, STAGES, teacher[6], balance, partner, *known))
    return Distiller(student, loss), Tap(teacher, loss.teacher_layers)


def small(method: str) -> dict:
    """Flags of a method, or of each of several, that suit so few samples."""
    parts = method.split("+")
    named = [(f"{part}_" if len(parts) > 1 else "", SMALL.get(part, {})) for part in parts]
    return {f"{prefix}{name}": value for prefix, flags in named for name, value in flags.items()}


def batch_of(index: Tensor, epoch: int = 0, method: str = "kd") -> Batch:
    """Rows of a fixed random data set, with a strong view if the method has two."""
    generator = torch.Generator().manual_seed(7)
    images, strong = (torch.randn(SAMPLES, 3, *SIZE, generator=generator) for _ in range(2))
    second = strong[index] if named_method(method).two_views else None
    return Batch(images[index], LABELS[index], index, epoch, torch.tensor(epoch), torch.tensor(0), strong=second)


def terms_of(distiller: Distiller, teacher: Tap, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs: Outputs = teacher.of_batch(batch)
    return distiller(batch, outputs).terms
