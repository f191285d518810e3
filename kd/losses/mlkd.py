"""Multi-level logit distillation (Jin et al., "Multi-Level Logit Distillation", CVPR 2023).

Both networks see two views of each image, one weakly and one strongly augmented. Their predictions are aligned at
several temperatures and at three levels: each sample, the relations between samples, the relations between classes.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kd.config.methods import MLKDConfig
from kd.losses.base import DistillationLoss, global_batch
from kd.losses.kd import check_shapes, kd_loss, masked_kd_loss, soft_logits, standardize
from kd.types import Batch, Outputs

WEAK_AS_STRONG = (2.0, 6.0)  # temperatures at which the authors' code compares the weak logits in its strong term too


def mlkd_loss(
    student_logits: Float[Tensor, "b k"],
    student_strong: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    teacher_strong: Float[Tensor, "b k"],
    temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0),
    as_in_paper: bool = False,
    standardized: bool = False,
) -> dict[str, Float[Tensor, ""]]:
    """The terms "instance", "batch" and "class", each summed over the temperatures and without a weight.

    instance: kd_loss of the weak view, masked, + kd_loss of the strong view. batch and class: `batch_relation_loss` and
    `class_relation_loss` of the weak view, masked. The masks keep what the teacher is unsure of in the weak view:
    samples whose confidence, and classes whose summed probability, is at most the batch's median.

    As in the authors' code, which made the published numbers and in two places does not do what it means to. A mask
    multiplies a mean over all samples: it scales the term by the kept share, about half, and leaves nothing out. And
    the strong term of temperatures 2 and 6 compares the weak logits. `as_in_paper` masks each sample's divergence and
    the columns of the relations, and compares the strong logits at every temperature.
    `standardized` scales the logits of "instance" alone, as in the code of arXiv:2403.01427.
    The batch and class terms depend on the batch: call it with the global batch's logits.
    Raises ValueError if the shapes differ.
    """
    for logits in (student_strong, teacher_logits, teacher_strong):
        check_shapes(student_logits, logits)
    probabilities = teacher_logits.softmax(dim=1)
    unsure, rare = _lower_half(probabilities.amax(dim=1)), _lower_half(probabilities.sum(dim=0))
    shares = [mask.to(student_logits.dtype).mean() for mask in (unsure, unsure, rare)]
    weak = student_logits, teacher_logits
    views = [weak, (student_strong, teacher_strong)]
    if standardized:
        views = [tuple(standardize(logits) for logits in view) for view in views]
    terms = dict.fromkeys(("instance", "batch", "class"), student_logits.new_zeros(()))
    for t in temperatures:
        second = views[1 if as_in_paper or t not in WEAK_AS_STRONG else 0]
        if as_in_paper:
            parts = masked_kd_loss(*views[0], unsure, t), _relation(*weak, t, 0, unsure), _relation(*weak, t, 1, rare)
        else:
            losses = kd_loss(*views[0], t), batch_relation_loss(*weak, t), class_relation_loss(*weak, t)
            parts = [share * loss for share, loss in zip(shares, losses, strict=True)]
        parts = parts[0] + kd_loss(*second, t), *parts[1:]
        terms = {name: terms[name] + part for name, part in zip(terms, parts, strict=True)}
    return terms


def batch_relation_loss(
    student_logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"], temperature: float
) -> Float[Tensor, ""]:
    """|P_t P_t' - P_s P_s'|^2 / b for softened predictions P: which samples of the batch are predicted alike.

    Without a factor T^2, as in the authors' code."""
    return _relation(student_logits, teacher_logits, temperature, 0)


def class_relation_loss(
    student_logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"], temperature: float
) -> Float[Tensor, ""]:
    """|P_t' P_t - P_s' P_s|^2 / k for softened predictions P: which classes are predicted together.

    Without a factor T^2, as in the authors' code."""
    return _relation(student_logits, teacher_logits, temperature, 1)


def _relation(student: Tensor, teacher: Tensor, temperature: float, dim: int, mask: Tensor | None = None) -> Tensor:
    """Squared difference of the Gram matrices over dimension `dim`, divided by its size; of the mask's columns only."""
    grams = []
    for logits in (student, teacher):
        rows = (logits / temperature).softmax(dim=1)
        rows = rows if dim == 0 else rows.T
        grams.append(rows @ rows.T)
    squares = (grams[0] - grams[1]).square()
    return (squares if mask is None else squares * mask).sum() / len(squares)


def _lower_half(values: Float[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """Which values are at most the median; of an even number the lower of the middle two, which keeps the same."""
    return values <= values.sort().values[(len(values) - 1) // 2]


class MLKD(DistillationLoss):
    """ce_weight * cross-entropy of each view + weight * each term of mlkd_loss."""

    config: MLKDConfig

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        views = torch.cat([student.logits, student.strong, teacher.logits, teacher.strong], dim=1)
        whole = global_batch(views).chunk(4, dim=1)  # relations and medians are the global batch's; gathered at once
        terms = mlkd_loss(*whole, config.temperatures, config.as_in_paper, config.standardize)
        hard = self.hard_labels_term(batch, student.logits, student.strong, weight=config.ce_weight)
        return hard | {name: config.weight * term for name, term in terms.items()}

    def soft_labels(self, teacher: Outputs) -> Float[Tensor, "b k"]:
        """At the middle one of the temperatures."""
        temperatures = sorted(self.config.temperatures)
        return soft_logits(self.config, teacher, temperatures[len(temperatures) // 2])
