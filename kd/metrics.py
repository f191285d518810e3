"""How good a network's predictions are, and the sums that training keeps on the device."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from kd.outputs import Step

BINS = 15  # of confidence: Guo et al., arXiv:1706.04599, section 4


def top_k(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"], k: int) -> float:
    """Percent of samples whose label is among the k largest logits."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()


def nll(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> float:
    """Mean negative log-likelihood in nats."""
    return F.cross_entropy(logits.double(), labels).item()


def by_confidence(
    logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], Int[Tensor, "n"]]:
    """Of each sample: its confidence, whether it is right (1 or 0), and which of the BINS equal bins it is in.

    Bins are open on the left: (0, 1/15], ..., (14/15, 1]."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.double, device=logits.device)
    return confidence, (predicted == labels).double(), (torch.bucketize(confidence, edges) - 1).clamp(0, BINS - 1)


def ece(logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> float:
    """Expected calibration error in percent: |accuracy - confidence| over equal bins of confidence, weighted by their
    samples (Guo et al., arXiv:1706.04599, section 2)."""
    confidence, right, bin_of = by_confidence(logits, labels)
    gaps = torch.zeros(BINS, dtype=torch.double, device=logits.device).index_add(0, bin_of, right - confidence)
    return 100 * gaps.abs().sum().item() / len(labels)


def agreement(logits: Float[Tensor, "n k"], others: Float[Tensor, "n k"]) -> float:
    """Percent of samples on which two networks predict the same class."""
    return 100 * (logits.argmax(dim=1) == others.argmax(dim=1)).double().mean().item()


@torch.no_grad()
def closeness(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    labels: Int[Tensor, "b"],
    soft_labels: Float[Tensor, "b k"] | None,
) -> dict[str, Tensor]:
    """Of one batch of training views, each averaged over it and left on the device.

    agreement and teacher_top1 in percent (of mixed images: with the harder label), kl = KL(teacher || student) and
    teacher_entropy in nats at temperature 1; soft_entropy is that of the labels as the method softens them.
    """
    log_student, log_teacher = student_logits.log_softmax(dim=1), teacher_logits.log_softmax(dim=1)
    answers = teacher_logits.argmax(dim=1)
    measures = {
        "agreement": 100 * (student_logits.argmax(dim=1) == answers).float().mean(),
        "kl": F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True),
        "teacher_top1": 100 * (answers == labels).float().mean(),
        "teacher_entropy": _entropy(log_teacher),
    }
    if soft_labels is not None:
        measures["soft_entropy"] = _entropy(soft_labels.log_softmax(dim=1))
    return measures


def _entropy(log_probabilities: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    return -(log_probabilities.exp() * log_probabilities).sum(dim=1).mean()


UNNAMED = 4  # sums of a Meter beside its terms and measures: two gradients' lengths, correct answers, samples
SPIKE = 10.0  # times its recent mean: a loss that is worth a warning
RECENT = 20  # steps that this mean goes back over, and that have to pass before anything is called a spike


class Meter:
    """Sums of loss terms, measures and correct answers, the first step whose loss was not finite, and the last spike.

    They stay on the device, one row a process, until `read`: nothing in `update` makes the host wait.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.terms: list[str] = []  # known from the first step on, as are the measures
        self.measures: list[str] = []
        self.reset()
        self.bad_step = torch.full((), -1, dtype=self.dtype, device=device)
        self.usual = torch.zeros((), dtype=self.dtype, device=device)  # the loss's recent mean, in this life
        self._steps = 0
        self._spike = torch.full((3,), -1, dtype=self.dtype, device=device)
        self.spike: tuple[float, float, float] | None = None  # step, loss, recent mean: since the last `read`

    def reset(self) -> None:
        """Start an epoch's sums: the terms', the measures', both gradients' lengths, correct answers, samples."""
        self.sums = torch.zeros(len(self.terms) + len(self.measures) + UNNAMED, dtype=self.dtype, device=self.device)

    def update(self, result: Step, labels: Int[Tensor, "b"], step: Int[Tensor, ""]) -> None:
        if not self.terms:
            self.terms, self.measures = list(result.terms), list(result.measures)
            self.reset()
        losses = torch.stack([result.terms[name].detach() for name in self.terms]).to(self.dtype)
        seen = [result.measures[name].to(self.dtype)[None] for name in self.measures]
        correct = (result.logits.detach().argmax(dim=1) == labels).sum().to(self.dtype)
        count = torch.full_like(correct, len(labels))
        means = torch.cat([losses, *seen, losses.new_zeros(2)])
        self.sums += torch.cat([means * count, correct[None], count[None]])
        bad = ~torch.isfinite(losses).all() & (self.bad_step < 0)
        self.bad_step = torch.where(bad, step.to(self.dtype), self.bad_step)
        self._notice(losses.sum(), step.to(self.dtype))

    def _notice(self, loss: Tensor, step: Tensor) -> None:
        """Remember a finite loss far above the recent ones. For a warning only: no checkpoint knows of it."""
        if self._steps >= RECENT:
            spiked = torch.isfinite(loss) & (self.usual > 0) & (loss > SPIKE * self.usual)
            self._spike = torch.where(spiked, torch.stack([step, loss, self.usual]), self._spike)
        share = 1 / min(self._steps + 1, RECENT)
        self.usual = torch.where(torch.isfinite(loss), self.usual + share * (loss - self.usual), self.usual)
        self._steps += 1

    def add_gradients(self, lengths: Float[Tensor, "2"]) -> None:
        """Of the distillation terms and of cross-entropy, at some of the steps; the same on every process."""
        self.sums[-4:-2] += lengths

    def read(self, accelerator: Accelerator, stop: int = 0) -> tuple[dict[str, float], int | None, int]:
        """Means over all processes so far, the first bad step if any, and the largest `stop` among the processes."""
        row = torch.cat([self.sums, self._spike, self.bad_step[None], torch.full_like(self.bad_step[None], stop)])
        rows = accelerator.gather(row[None]).cpu()
        *sums, distillation, cross_entropy, correct, samples = rows[:, :-5].sum(dim=0).tolist()
        spikes = [tuple(spike) for spike in rows[:, -5:-2].tolist() if spike[0] >= 0]
        self.spike = max(spikes, default=None)
        self._spike = torch.full_like(self._spike, -1)
        bad = [int(step) for step in rows[:, -2].tolist() if step >= 0]
        samples = max(samples, 1)
        names = (f"train/{name}" for name in (*self.terms, *self.measures))
        means = {name: value / samples for name, value in zip(names, sums, strict=True)}
        loss = sum(list(means.values())[: len(self.terms)], 0.0)
        means = {"train/loss": loss, **means, "train/top1": 100 * correct / samples}
        if cross_entropy:
            means["train/gradient_ratio"] = distillation / cross_entropy
        return means, min(bad, default=None), int(rows[:, -1].max())

    def save(self, accelerator: Accelerator) -> dict:
        return {"terms": self.terms, "measures": self.measures, "rows": accelerator.gather(self.sums[None]).tolist()}

    def restore(self, saved: dict, process: int) -> None:
        """Each process takes its own row back, so that sums go on in the same order."""
        self.terms, self.measures = list(saved["terms"]), list(saved["measures"])
        self.sums = torch.tensor(saved["rows"][process], dtype=self.dtype, device=self.device)
