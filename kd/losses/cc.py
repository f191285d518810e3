"""Correlation congruence (Peng et al., arXiv:1904.01802): the paper's loss, and the one behind published tables."""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.config.methods import CCConfig
from kd.losses.base import global_batch
from kd.losses.features import FeatureLoss, check_batches, embeddings, probed_embeddings
from kd.types import Batch, Outputs, Pair, Stages


def correlation_congruence_loss(
    student_embedding: Float[Tensor, "b d"], teacher_embedding: Float[Tensor, "b e"], gamma: float = 0.4, order: int = 2
) -> Float[Tensor, ""]:
    """The paper's loss: mean squared difference of two kernel matrices.

    The kernel is the Gaussian exp(-gamma |x - y|^2) between embeddings of length 1, as a Taylor series in their inner
    product up to `order`: exp(-2 gamma) * sum_p (2 gamma)^p / p! * (x . y)^p. Raises ValueError if the batches differ.
    """
    check_batches(student_embedding, teacher_embedding)
    both = (student_embedding, teacher_embedding)
    student, teacher = (_kernel(F.normalize(embedding), gamma, order) for embedding in both)
    return (student - teacher).square().mean()


def _kernel(unit: Float[Tensor, "b d"], gamma: float, order: int) -> Float[Tensor, "b b"]:
    gram = unit @ unit.T
    series = sum((2 * gamma) ** power / math.factorial(power) * gram**power for power in range(order + 1))
    return math.exp(-2 * gamma) * series


def neighbour_product_loss(
    student_embedding: Float[Tensor, "b d"], teacher_embedding: Float[Tensor, "b d"]
) -> Float[Tensor, ""]:
    """A different loss, which the code behind the literature's tables computes under this name (arXiv:1910.10699).

    With d_i the absolute difference of sample i's embeddings: the mean over i of the sum over features of
    d_i * d_(i+1). It depends on the order of the batch, and compares no correlations. 0 for one sample.
    Raises ValueError if the batches differ.
    """
    check_batches(student_embedding, teacher_embedding)
    difference = (student_embedding - teacher_embedding).abs()
    if len(difference) == 1:
        return 0 * difference.sum()
    return (difference[:-1] * difference[1:]).sum(dim=1).mean()


class CC(FeatureLoss):
    """Cross-entropy + weight * the loss that --definition names, over the global batch.

    For `neighbours` both embeddings, the teacher's too, first pass a learned linear layer of `width`, as in that code.
    """

    config: CCConfig
    compares_images = True

    @classmethod
    def default_layers(cls, config: CCConfig, stages: Stages) -> tuple[str, ...]:
        return stages.embedding

    def __init__(self, config: CCConfig, pair: Pair):
        super().__init__(config, pair)
        widths = probed_embeddings(pair)
        learned = config.definition == "neighbours"
        self.embed = nn.ModuleList(nn.Linear(width, config.width) if learned else nn.Identity() for width in widths)
        self.embedding_loss = neighbour_product_loss if learned else correlation_congruence_loss

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        embedded = [embed(embedding) for embed, embedding in zip(self.embed, embeddings(student, teacher))]
        term = self.embedding_loss(*(global_batch(embedding) for embedding in embedded))
        return self.common_terms(student, teacher, batch) | {"cc": self.config.weight * term}
