"""Which of the loss terms pulls harder, and what gives reason to warn. Nothing here changes the training."""

import math

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from kd.losses.base import Distiller
from kd.types import Batch, Outputs

SURE_TEACHER = (
    0.01  # of log(classes): a teacher surer than this says what the labels say (for 100 classes, 99.5% on one)
)


DROWNED_RATIO = (
    100.0  # times: the weaker gradient is then lost in the noise of the stronger one. Both are our own choices.
)


def gradient_norms(distiller: Distiller, batch: Batch, answer: Outputs, accelerator: Accelerator) -> Float[Tensor, "2"]:
    """Lengths of the student's gradients of all distillation terms together and of cross-entropy, as they are weighted.

    Both over the global batch, and 0 where either is not finite. Costs a forward and two backward passes beside the
    step; buffers (BatchNorm's statistics, a method's bank) are copies, so that nothing is left of it.
    """
    buffers = {name: buffer.clone() for name, buffer in distiller.named_buffers()}
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    with accelerator.autocast():
        terms = dict(functional_call(distiller, buffers, (batch, answer)).terms)
    cross_entropy, distillation = terms.pop("ce"), sum(terms.values())
    norms = []
    for term in (distillation, cross_entropy):
        if accelerator.scaler is not None:
            term = accelerator.scaler.scale(term)  # both alike: only their ratio is kept
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
        norms.append(accelerator.reduce(torch.cat([part.flatten() for part in gradients]), "mean").norm())
    lengths = torch.stack(norms)
    return torch.where(lengths.isfinite().all(), lengths, 0)


def warnings(history: list[dict], classes: int) -> list[str]:
    """What the last epoch's line gives reason to say, and none before it did."""
    found = [_findings(line, classes) for line in history]
    return [words for kind, words in found[-1].items() if not any(kind in before for before in found[:-1])]


def _findings(line: dict, classes: int) -> dict[str, str]:
    found = {}
    entropy, ratio = line.get("train/soft_entropy"), line.get("train/gradient_ratio")
    if entropy is not None and entropy < SURE_TEACHER * math.log(classes):
        found["silent"] = (
            f"the teacher's soft labels say hardly more than the labels: their entropy is {entropy:.2g} nats of at most"
            f" {math.log(classes):.2g}; raise --temperature, or take a teacher that is less sure of its training images"
        )
    if ratio is not None and ratio > DROWNED_RATIO:
        found["loud"] = (
            f"the distillation term drowns cross-entropy: its gradient is {ratio:.0f} times as long; weigh it less,"
            " unless that is what you want"
        )
    if ratio is not None and ratio < 1 / DROWNED_RATIO:
        found["faint"] = (
            f"cross-entropy drowns the distillation term, whose gradient is {ratio:.2g} times as long: the student"
            " hardly follows its teacher; weigh it more"
        )
    return found
