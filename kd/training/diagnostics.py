"""Warnings about a training: how the gradients of its loss terms compare, and whether the soft labels are soft.

Nothing here changes the training.
"""

import math

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from kd.losses.base import Distiller
from kd.types import Batch, Outputs

SURE_TEACHER = (
    0.01  # of log(classes): soft labels of less entropy are nearly the labels (for 100 classes, 99.5% on one)
)


DROWNED_RATIO = 100.0  # ratio of gradient norms beyond which the weaker one is lost in noise. Both are our own choices.


def gradient_norms(
    distiller: Distiller, batch: Batch, teacher_outputs: Outputs, accelerator: Accelerator, recomputes: bool = False
) -> Float[Tensor, "2"]:
    """Norms of the student's gradients: of all weighted distillation terms together, and of weighted cross-entropy.

    Both over the global batch; both 0 if either is not finite. Costs a forward and two backward passes beside the step;
    works on copies of the buffers (BatchNorm's statistics, a method's bank), so that training is not affected.
    `recomputes`: whether backward runs parts of the student again (gradient checkpointing), which would move its own.
    """
    before = [buffer.clone() for buffer in distiller.buffers()] if recomputes else []
    buffers = {name: buffer.clone() for name, buffer in distiller.named_buffers()}
    parameters = distiller.trained_parameters()
    with accelerator.autocast():
        terms = dict(functional_call(distiller, buffers, (batch, teacher_outputs)).terms)
    cross_entropy, distillation = terms.pop("ce"), sum(terms.values())
    norms = []
    for term in (distillation, cross_entropy):
        if accelerator.scaler is not None:
            term = accelerator.scaler.scale(term)  # both alike: only their ratio is used
        if term.requires_grad:
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
        else:  # a term that is only logged
            gradients = [torch.zeros_like(part) for part in parameters]
        norms.append(accelerator.reduce(torch.cat([part.flatten() for part in gradients]), "mean").norm())
    if recomputes:
        with torch.no_grad():
            for buffer, value in zip(distiller.buffers(), before, strict=True):
                buffer.copy_(value)
    lengths = torch.stack(norms)
    return torch.where(lengths.isfinite().all(), lengths, 0)


def warnings(history: list[dict], classes: int) -> list[str]:
    """The warnings that the last epoch gives reason for and no earlier epoch did."""
    *earlier, last = [_warnings_of(line, classes) for line in history]
    return [warning for kind, warning in last.items() if not any(kind in before for before in earlier)]


def _warnings_of(line: dict, classes: int) -> dict[str, str]:
    """Kind -> warning, for one epoch's line of metrics.jsonl."""
    warnings_by_kind = {}
    entropy, ratio = line.get("train/soft_entropy"), line.get("train/gradient_ratio")
    if entropy is not None and entropy < SURE_TEACHER * math.log(classes):
        warnings_by_kind["silent"] = (
            f"the teacher's soft labels are nearly the hard labels: their entropy is {entropy:.2g} nats of at most"
            f" {math.log(classes):.2g}; raise its temperature, or take a teacher less sure of its training images"
        )
    if ratio is not None and ratio > DROWNED_RATIO:
        warnings_by_kind["loud"] = (
            f"the distillation term drowns cross-entropy: its gradient is {ratio:.0f} times as long; weigh it less,"
            " unless that is what you want"
        )
    if ratio is not None and ratio < 1 / DROWNED_RATIO:
        warnings_by_kind["faint"] = (
            f"cross-entropy drowns the distillation term, whose gradient is {ratio:.2g} times as long: the student"
            " hardly follows its teacher; weigh it more"
        )
    return warnings_by_kind
