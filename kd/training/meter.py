"""What is measured during training: sums of loss terms and correct answers on the device, and the speed of steps."""

import math
import time

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from kd.errors import require
from kd.metrics import predicted
from kd.types import Step
from kd.utils.floats import widest

OTHER_SUMS = 4  # of a Meter, beside terms and measures: two gradient norms, correct predictions, samples
BLOCK = 64  # rows for which memory on the device is taken at once
SPIKE = 10.0  # a loss this many times its recent mean is worth a warning
OWN_NAMES = {"loss", "top1", "gradient_ratio"}  # numbers of metrics.jsonl that are no terms
RECENT = 20  # steps in that mean; there is no warning before as many have passed
SETTLING = 10  # steps that images_per_second leaves out: caches fill, kernels are chosen


class Meter:
    """Sums of loss terms, measures and correct predictions, the first step with a non-finite loss, and the last spike.

    `update` writes one row on the device, and nothing in it makes the host wait. What was written since the last time
    is added up on the host, in order and in double precision, by `read` and `save`.
    """

    def __init__(self, device: torch.device, labelled: bool = True):
        """`labelled`: whether there are labels by which predictions are correct or not."""
        self.device, self.labelled = device, labelled
        self.dtype = widest(device)
        self.terms: list[str] = []  # known from the first step on, as are the measures
        self.measures: list[str] = []
        self.bad_step = -1.0
        self.usual = 0.0  # the loss's recent mean, since this process began
        self._steps = 0
        self._spike = (-1.0, -1.0, -1.0)
        self.spike: tuple[float, float, float] | None = None  # step, loss, recent mean: since the last `read`
        self.reset()

    def reset(self) -> None:
        """Start an epoch's sums: terms, measures, both gradient norms, correct predictions, samples."""
        self.sums = [0.0] * (len(self.terms) + len(self.measures) + OTHER_SUMS)
        self._forget_rows()

    def _forget_rows(self) -> None:
        self._blocks: list[Float[Tensor, "n m"]] = []  # rows not added up yet: terms, measures, correct, step
        self._samples: list[int] = []  # of each such row
        self._norms: list[Tensor] = []

    def update(self, result: Step, labels: Int[Tensor, "b"], step: Int[Tensor, ""]) -> None:
        if not self.terms:
            self.terms, self.measures = list(result.terms), list(result.measures)
            self.reset()
        values = [result.terms[name].detach() for name in self.terms]
        values += [result.measures[name] for name in self.measures]
        place = len(self._samples) % BLOCK
        if place == 0:
            self._blocks.append(torch.empty(BLOCK, len(values) + 2, dtype=self.dtype, device=self.device))
        row = self._blocks[-1][place]
        row[:-2].copy_(torch.stack(values))
        if self.labelled:
            row[-2].copy_((predicted(result.logits.detach()) == labels).sum())
        else:
            row[-2].zero_()
        row[-1].copy_(step)
        self._samples.append(len(labels))

    def add_gradients(self, norms: Float[Tensor, "2"]) -> None:
        """Add the gradient norms of the distillation terms and of cross-entropy; the same on every process."""
        self._norms.append(norms)

    def _add_up(self) -> None:
        """Add the rows since the last time to the sums. Waits for the device."""
        rows = torch.cat(self._blocks).tolist() if self._blocks else []
        for (*values, correct, step), samples in zip(rows, self._samples):  # a block's end may be unwritten
            for place, value in enumerate(values):
                self.sums[place] += value * samples
            self.sums[-2] += correct
            self.sums[-1] += samples
            losses = values[: len(self.terms)]
            if self.bad_step < 0 and not all(map(math.isfinite, losses)):
                self.bad_step = step
            self._track_spike(sum(losses), step)
        for distillation, cross_entropy in [norms.tolist() for norms in self._norms]:
            self.sums[-4] += distillation
            self.sums[-3] += cross_entropy
        self._forget_rows()

    def _track_spike(self, loss: float, step: float) -> None:
        """Record a finite loss far above the recent ones. For a warning only: it is in no checkpoint."""
        finite = math.isfinite(loss)
        if self._steps >= RECENT and finite and self.usual > 0 and loss > SPIKE * self.usual:
            self._spike = (step, loss, self.usual)
        if finite:
            self.usual += (loss - self.usual) / min(self._steps + 1, RECENT)
        self._steps += 1

    def read(self, accelerator: Accelerator, stop: int = 0) -> tuple[dict[str, float], int | None, int]:
        """Means over all processes so far, the first bad step if any, and the largest `stop` among the processes."""
        self._add_up()
        row = [*self.sums, *self._spike, self.bad_step, stop]
        rows = accelerator.gather(torch.tensor([row], dtype=self.dtype, device=self.device)).cpu()
        *sums, distillation, cross_entropy, correct, samples = rows[:, :-5].sum(dim=0).tolist()
        spikes = [tuple(spike) for spike in rows[:, -5:-2].tolist() if spike[0] >= 0]
        self.spike = max(spikes, default=None)
        self._spike = (-1.0, -1.0, -1.0)
        bad = [int(step) for step in rows[:, -2].tolist() if step >= 0]
        samples = max(samples, 1)
        names = (f"train/{name}" for name in (*self.terms, *self.measures))
        means = {name: value / samples for name, value in zip(names, sums, strict=True)}
        loss = sum(list(means.values())[: len(self.terms)], 0.0)
        means = {"train/loss": loss, **means}
        if self.labelled:
            means["train/top1"] = 100 * correct / samples
        if cross_entropy:
            means["train/gradient_ratio"] = distillation / cross_entropy
        return means, min(bad, default=None), int(rows[:, -1].max())

    def save(self, accelerator: Accelerator) -> dict:
        self._add_up()
        sums = torch.tensor([self.sums], dtype=self.dtype, device=self.device)
        return {"terms": self.terms, "measures": self.measures, "rows": accelerator.gather(sums).tolist()}

    def restore(self, saved: dict, process: int) -> None:
        """Take this process's own row back, so that sums continue in the same order.

        Raises ValueError where a row has another number of sums than the terms and measures need.
        """
        self.terms, self.measures = list(saved["terms"]), list(saved["measures"])
        wanted = len(self.terms) + len(self.measures) + OTHER_SUMS
        if len(saved["rows"][process]) != wanted:
            raise ValueError(f"state.json has sums of {len(saved['rows'][process])} numbers, wanted are {wanted}")
        self.sums = list(saved["rows"][process])
        self._forget_rows()


def check_terms(result: Step, method: str, cross_entropy: bool = False) -> None:
    """Raise UserError unless the loss terms are scalars under names of their own, to train by. Reads no values.

    `cross_entropy`: whether the method says that it has one.
    """
    terms = result.terms
    found = type(terms).__name__ if not isinstance(terms, dict) else "an empty dict" if not terms else ""
    require(not found, f"{method}: its forward returns {found}; return the loss terms by name: {{'ce': ..., ...}}")
    wrong = [name for name, term in terms.items() if not _is_number(term)]
    require(not wrong, f"{method}: its term {wrong and wrong[0]!r} is no scalar tensor; average it over the batch")
    taken = sorted(terms.keys() & (OWN_NAMES | result.measures.keys()))
    require(not taken, f"{method}: its term {taken and taken[0]!r} has the name of another number; call it otherwise")
    trains = any(term.requires_grad for term in terms.values())
    require(
        trains, f"{method}: no term has a gradient, so nothing would be trained; compute one from the student's logits"
    )
    require(
        not cross_entropy or "ce" in terms,
        f"{method}: has no term 'ce': give its cross-entropy that name, or its class has_cross_entropy = False",
    )


def _is_number(term: object) -> bool:
    return isinstance(term, Tensor) and term.ndim == 0 and term.is_floating_point()


class Clock:
    """Times training steps alone, from the eleventh of this process on, into `timing` (images, seconds)."""

    def __init__(self, timing: dict[str, float], device: torch.device):
        self.timing, self.device = timing, device
        for key in ("images", "seconds"):
            timing.setdefault(key, 0.0)
        self._steps = 0
        self._since: float | None = None

    def step(self, images: int) -> None:
        self._steps += 1
        if self._steps == SETTLING and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # once a process: the clock starts when the device has caught up
        if self._since is None and self._steps >= SETTLING:
            self._since = time.monotonic()
        elif self._since is not None:
            self.timing["images"] += images

    def rate(self) -> float | None:
        """Images per second of this run so far; None in the first steps."""
        running = time.monotonic() - self._since if self._since is not None else 0.0
        seconds = self.timing["seconds"] + running
        return self.timing["images"] / seconds if self.timing["images"] and seconds else None

    def pause(self) -> None:
        """Stop the clock before other work than training, once the device's numbers have been read."""
        if self._since is not None:
            self.timing["seconds"] += time.monotonic() - self._since
            self._since = None
