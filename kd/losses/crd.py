"""Contrastive representation distillation (Tian et al., arXiv:1910.10699)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.config.methods import CRDConfig
from kd.errors import require
from kd.losses.base import global_batch
from kd.losses.features import FeatureLoss, embeddings, probed_embeddings
from kd.types import Batch, Outputs, Pair, Stages
from kd.utils.rng import random_bits


def contrastive_loss(scores: Float[Tensor, "b n"], normalizer: Float[Tensor, ""], samples: int) -> Float[Tensor, ""]:
    """Noise-contrastive estimation (section 3): summed over columns, averaged over the batch.

    A score is an inner product of embeddings / temperature: the positive's in column 0, the negatives' in the others.
    exp(score) / normalizer estimates the probability of a pair, against the noise's (n - 1) / samples. Computed in
    logarithms, so that nothing overflows.
    Differs from the authors' code: no eps of 1e-7 beside the noise's probability.
    """
    noise = math.log((scores.shape[1] - 1) / samples)
    odds = scores - normalizer.log() - noise
    return -(F.logsigmoid(odds[:, 0]) + F.logsigmoid(-odds[:, 1:]).sum(dim=1)).mean()


class Negatives(nn.Module):
    """Draws samples of other classes, uniformly and as a pure function of (seed, epoch, sample): no state to save."""

    def __init__(self, labels: Int[Tensor, "n"], count: int, key: int):
        super().__init__()
        self.count, self.key = count, key
        # Sorted by class, the samples of other classes are all but one contiguous run.
        counts = torch.bincount(labels)
        require(
            int((counts > 0).sum()) > 1,
            "crd: contrasts samples of different classes, and the data has only one; choose another method",
        )
        self.register_buffer("order", labels.argsort(stable=True), persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)

    def forward(self, batch: Batch) -> Int[Tensor, "b n"]:
        own, start = self.counts[batch.label], self.starts[batch.label]
        row = random_bits(batch.epoch * len(self.order) + batch.index, self.key, "row")
        column = torch.arange(self.count, device=row.device)
        bits = random_bits(row[:, None] ^ column, self.key, "negatives")
        place = (bits * (len(self.order) - own)[:, None]) >> 32
        return self.order[place + torch.where(place >= start[:, None], own[:, None], 0)]


class Embed(nn.Module):
    """A linear layer, then scaling to length 1."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.linear = nn.Linear(width_in, width)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        return F.normalize(self.linear(x))


class CRD(FeatureLoss):
    """Cross-entropy + weight * (student against the teacher's bank + teacher against the student's).

    The banks store both embeddings of every training sample. The global batch updates them, so they are the same on
    every process. The first batch sets the normalisers; checkpoints include both.
    Memory: 2 * n * width numbers for the banks, 51 MB for CIFAR-100, and 2 * b * (n + negatives) for the scores, 34 MB
    at b = 64; the authors' code gathers b * negatives * width numbers.
    Differs from the authors' code: draws negatives with replacement; they do so only when a class runs out.
    """

    config: CRDConfig
    needs_hard_labels = True

    @classmethod
    def default_layers(cls, config: CRDConfig, stages: Stages) -> tuple[str, ...]:
        return stages.embedding

    def __init__(self, config: CRDConfig, pair: Pair):
        super().__init__(config, pair)
        require(
            pair.balance != "sampler",
            "crd: --balance sampler may draw an image twice in a batch, and on a GPU chance would say which one a bank"
            " keeps; take --balance weights",
        )
        self.embed = nn.ModuleList(Embed(width, config.width) for width in probed_embeddings(pair))
        samples, bound = len(pair.labels), 1 / math.sqrt(config.width / 3)  # the authors' start
        self.negatives = Negatives(pair.labels, config.negatives, int(torch.randint(2**62, ())))
        self.register_buffer("banks", torch.empty(2, samples, config.width).uniform_(-bound, bound))
        self.register_buffer("normalizers", torch.zeros(2))  # 0 until the first batch

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        embedded = [embed(embedding) for embed, embedding in zip(self.embed, embeddings(student, teacher))]
        pairs = torch.cat([batch.index[:, None], self.negatives(batch)], dim=1)
        banks = self.banks.clone()  # backward needs the values from before the update
        # Products with the whole bank, then a gather: moves far less memory than gathering the embeddings.
        scores = [(embedding @ bank.T).gather(1, pairs) for embedding, bank in zip(embedded, banks.flip(0))]
        scores = [score / self.config.contrast_temperature for score in scores]
        normalizers = self._normalizers(scores)
        samples = banks.shape[1]
        term = sum(contrastive_loss(score, z, samples) for score, z in zip(scores, normalizers))
        self._update_banks(embedded, batch.index)
        return self.common_terms(student, teacher, batch) | {"crd": self.config.weight * term}

    @torch.no_grad()
    def _normalizers(self, scores: list[Float[Tensor, "b n"]]) -> Float[Tensor, "2"]:
        """The student's and the teacher's normaliser: the first batch's mean of exp(score), times the samples."""
        means = torch.stack([global_batch(score.exp().mean(dim=1)).mean() for score in scores])
        if self.training:
            self.normalizers.copy_(torch.where(self.normalizers == 0, means * self.banks.shape[1], self.normalizers))
        return self.normalizers.clone()

    @torch.no_grad()
    def _update_banks(self, embedded: list[Float[Tensor, "b d"]], index: Int[Tensor, "b"]) -> None:
        if not self.training:
            return
        index, keep = global_batch(index), self.config.bank_momentum
        fresh = torch.stack([global_batch(embedding.detach()) for embedding in embedded])
        mixed = keep * self.banks[:, index] + (1 - keep) * fresh
        self.banks[:, index] = F.normalize(mixed, dim=2)
