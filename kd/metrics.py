"""How good a network's predictions are, and the sums that training keeps on the device."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor


def top_k(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"], k: int) -> float:
    """Percent of samples whose label is among the k largest logits."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()


def nll(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> float:
    """Mean negative log-likelihood in nats."""
    return F.cross_entropy(logits.double(), labels).item()


def ece(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"], bins: int = 15) -> float:
    """Expected calibration error in percent: |accuracy - confidence| over equal bins of confidence, weighted by their
    samples (Guo et al., arXiv:1706.04599, section 2). Bins are open on the left: (0, 1/15], ..., (14/15, 1]."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.double, device=logits.device)
    bin_of = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)
    gap = (predicted == labels).double() - confidence
    gaps = torch.zeros(bins, dtype=torch.double, device=logits.device).index_add(0, bin_of, gap)
    return 100 * gaps.abs().sum().item() / len(labels)


def agreement(logits: Float[Tensor, "n k"], others: Float[Tensor, "n k"]) -> float:
    """Percent of samples on which two networks predict the same class."""
    return 100 * (logits.argmax(dim=1) == others.argmax(dim=1)).double().mean().item()


class Meter:
    """Sums of loss terms and correct answers, and the first step at which a loss was not finite.

    They stay on the device, one row a process, until `read`: nothing in `update` makes the host wait.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.terms: list[str] = []  # known from the first step on
        self.reset()
        self.bad_step = torch.full((), -1, dtype=self.dtype, device=device)

    def reset(self) -> None:
        """Start an epoch's sums: the terms', correct answers, samples."""
        self.sums = torch.zeros(len(self.terms) + 2, dtype=self.dtype, device=self.device)

    def update(self, terms: dict[str, Tensor], logits: Tensor, labels: Tensor, step: Tensor) -> None:
        if not self.terms:
            self.terms = list(terms)
            self.reset()
        losses = torch.stack([terms[name].detach() for name in self.terms]).to(self.dtype)
        correct = (logits.detach().argmax(dim=1) == labels).sum().to(self.dtype)
        count = torch.full_like(correct, len(labels))
        self.sums += torch.cat([losses * count, correct[None], count[None]])
        bad = ~torch.isfinite(losses).all() & (self.bad_step < 0)
        self.bad_step = torch.where(bad, step.to(self.dtype), self.bad_step)

    def read(self, accelerator: Accelerator, stop: int = 0) -> tuple[dict[str, float], int | None, int]:
        """Means over all processes so far, the first bad step if any, and the largest `stop` among the processes."""
        row = torch.cat([self.sums, self.bad_step[None], torch.full_like(self.bad_step[None], stop)])
        rows = accelerator.gather(row[None]).cpu()
        *terms, correct, samples = rows[:, :-2].sum(dim=0).tolist()
        bad = [int(step) for step in rows[:, -2].tolist() if step >= 0]
        samples = max(samples, 1)
        means = {f"train/{name}": value / samples for name, value in zip(self.terms, terms, strict=True)}
        means = {"train/loss": sum(means.values(), 0.0), **means, "train/top1": 100 * correct / samples}
        return means, min(bad, default=None), int(rows[:, -1].max())

    def save(self, accelerator: Accelerator) -> dict:
        return {"terms": self.terms, "rows": accelerator.gather(self.sums[None]).tolist()}

    def restore(self, saved: dict, process: int) -> None:
        """Each process takes its own row back, so that sums go on in the same order."""
        self.terms = list(saved["terms"])
        self.sums = torch.tensor(saved["rows"][process], dtype=self.dtype, device=self.device)
