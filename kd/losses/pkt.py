"""Probabilistic knowledge transfer (Passalis & Tefas, arXiv:1803.10837)."""

from jaxtyping import Float
from torch import Tensor

from kd.config.methods import PKTConfig
from kd.losses.base import global_batch
from kd.losses.features import FeatureLoss, check_batches, embeddings, probed_embeddings
from kd.types import Batch, Outputs, Pair, Stages

EPS = 1e-7  # the authors'


def pkt_loss(student_embedding: Float[Tensor, "b d"], teacher_embedding: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """Divergence between the probabilities that samples are neighbours: mean of p_t * log(p_t / p_s) over b * b pairs.

    A sample's probabilities are its cosine similarities s as (s + 1) / 2, scaled to sum 1.
    Differs from the paper: the mean over pairs, as in the authors' code, instead of the sum. Raises ValueError if the
    batches differ.
    """
    check_batches(student_embedding, teacher_embedding)
    student, teacher = (_neighbours(embedding) for embedding in (student_embedding, teacher_embedding))
    return (teacher * ((teacher + EPS) / (student + EPS)).log()).mean()


def _neighbours(embedding: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    unit = embedding / (embedding.norm(dim=1, keepdim=True) + EPS)
    similarity = (unit @ unit.T + 1) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)


class PKT(FeatureLoss):
    """Cross-entropy + weight * pkt_loss of the pooled embeddings, over the global batch."""

    config: PKTConfig
    compares_images = True

    @classmethod
    def default_layers(cls, config: PKTConfig, stages: Stages) -> tuple[str, ...]:
        return stages.embedding

    def __init__(self, config: PKTConfig, pair: Pair):
        super().__init__(config, pair)
        probed_embeddings(pair)  # raises unless there is one layer of each

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        term = pkt_loss(*(global_batch(embedding) for embedding in embeddings(student, teacher)))
        return self.common_terms(student, teacher, batch) | {"pkt": self.config.weight * term}
