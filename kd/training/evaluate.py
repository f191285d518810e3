"""Scoring a network on the validation split and, once, on the test split."""

import math
from collections.abc import Callable
from functools import cached_property

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd import metrics
from kd.config import FitConfig, Job
from kd.data import Data
from kd.data.loader import Pixels
from kd.data.rows import Rows
from kd.data.splits import is_imbalanced
from kd.data.workers import WorkerRows
from kd.losses.base import Distiller, each_alone
from kd.metrics import rare_class_scores
from kd.runs.checkpoint import Weights
from kd.runs.results import AVERAGED_SCORES
from kd.teachers.live import TeacherLogits
from kd.teachers.load import TeacherNetwork
from kd.training.average import weights_in
from kd.types import Batch
from kd.utils.compiling import compiled
from kd.utils.processes import all_do, broadcast_buffers, nothing

AT_ONCE = 256  # images of 224 x 224 that a GPU scores in one batch, which is more than it trains on; larger ones fewer
PAYS = 10_000  # batches in a run from which compiling to score pays: half a minute for 2 to 3 ms each (an estimate)
LAST_EPOCH = 2**20  # in which every ramp of a loss is at its end

SCORED = 256  # images of which the distillation loss is computed at once


class Scorer:
    """A split on which networks are scored `times` times. It is placed on the device once, at the first of them."""

    def __init__(self, split: Rows, data: Data, accelerator: Accelerator, batch_size: int, times: int = 1):
        self.split, self.data, self.accelerator = split, data, accelerator
        self.rows, self.on_cpu = len(split.labels), accelerator.device.type == "cpu"
        self.share = self._share(max(batch_size // accelerator.num_processes, 1))
        batches = math.ceil(self.rows / (self.share * accelerator.num_processes))
        self.compiles = times * batches >= PAYS
        self._compiled: tuple[nn.Module, Callable] | None = None

    def _share(self, trained: int) -> int:
        """Images of a batch of one process, which trains on batches of `trained`."""
        if isinstance(self.split, WorkerRows):
            return trained  # larger ones might not fit the memory that the workers share
        if self.on_cpu:
            return trained  # small batches are summed in another order: the last bits depend on their size
        height, width = self.data.size
        own = max(trained, min(AT_ONCE, AT_ONCE * 224**2 // (height * width)))
        return max(min(own, math.ceil(self.rows / self.accelerator.num_processes)), 1)

    @cached_property
    def pixels(self) -> Pixels:
        return Pixels(self.split, self.data, self.accelerator.device)

    @cached_property
    def _indices(self) -> tuple[range, list[Tensor]]:
        """Where this process's batches start, and their rows. On a GPU all have one size, which is compiled once."""
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        starts = range(process * self.share, self.rows, processes * self.share)
        place = self.pixels.split.labels.device  # an index from elsewhere would be copied there in every batch
        indices = [torch.arange(start, start + self.share, device=place) for start in starts]
        if self.on_cpu:
            return starts, [index[: self.rows - start] for start, index in zip(starts, indices)]
        return starts, [index.clamp(max=self.rows - 1) for index in indices]

    @property
    def labels(self) -> Int[Tensor, "n"]:
        return self.pixels.split.labels

    @torch.no_grad()
    def logits(self, network: nn.Module) -> Float[Tensor, "n k"]:
        """The network's logits for every row, in eval mode; all processes share the work and get all rows.

        One process writes each row and the others leave it zero, so that the sum over processes has every row exactly
        once.
        """
        training, run = network.training, self._runs(network)
        network.eval()
        broadcast_buffers(network)
        logits = torch.zeros(self.rows, len(self.data.classes), device=self.accelerator.device)
        starts, indices = self._indices
        for start, images in zip(starts, self.pixels.centre_crops(indices)):
            with self.accelerator.autocast():
                answers = run(images)
            logits[start : start + self.share] = answers[: self.rows - start].float()
        network.train(training)
        all_do(nothing)  # another process may read its images for minutes longer
        total = self.accelerator.reduce(logits, "sum")
        return total.cpu() if total.device.type == "mps" else total  # MPS has no float64, which scoring uses

    def _runs(self, network: nn.Module) -> Callable:
        """The network, compiled where that pays."""
        if not self.compiles:
            return network
        if self._compiled is None or self._compiled[0] is not network:
            # Without CUDA graphs, which would hold memory of their own through the whole training.
            self._compiled = network, compiled(network, self.accelerator, mode="default")
        return self._compiled[1]


def predict_logits(
    network: nn.Module, split: Rows, data: Data, accelerator: Accelerator, batch_size: int
) -> Float[Tensor, "n k"]:
    """The network's logits for every row of the split, in eval mode, as Scorer has them."""
    return Scorer(split, data, accelerator, batch_size).logits(network)


def validation(data: Data, job: Job, accelerator: Accelerator) -> Scorer | None:
    """The validation split, for all epochs of a training; None if there is none."""
    times = job.fit.epochs * (1 if job.fit.ema is None else 2)
    return data.val and Scorer(data.val, data, accelerator, job.fit.batch_size, times)


@torch.no_grad()
def distillation_loss(distiller: Distiller, teacher: TeacherLogits, scorer: Scorer, fit: FitConfig) -> dict[str, float]:
    """The method's loss on the scorer's images, which have no labels, and its measures.

    Means over all images, in eval mode, of centre crops, which also stand for the strong view; weights that rise with
    the epochs are the full ones, whatever the run's length. The images come in parts of nearly equal size, at most
    SCORED, each of which one process scores whole: the numbers are the same for any number of processes, also of losses
    that compare the images of a batch.
    """
    rows, pixels, accelerator = scorer.rows, scorer.pixels, scorer.accelerator
    training, device = distiller.training, accelerator.device
    broadcast_buffers(distiller)
    distiller.eval()
    every = torch.arange(rows, device=pixels.split.labels.device)
    parts = every.tensor_split(math.ceil(rows / min(fit.batch_size, SCORED)))
    parts = parts[accelerator.process_index :: accelerator.num_processes]
    view, epoch = (torch.full((), number, device=device) for number in (0, LAST_EPOCH))
    found: list[dict[str, Tensor]] = []
    with each_alone():
        for index, image in zip(parts, pixels.centre_crops(parts)):
            strong = image if distiller.loss.config.two_views else None
            no_rows = torch.full_like(index, -1, device=device)
            batch = Batch(image, pixels.labels(index), no_rows, view, epoch, epoch, strong=strong)
            with accelerator.autocast():
                result = distiller(batch, teacher(batch))
            found.append({"val/loss": sum(result.terms.values()), **_named(result.measures)})
    distiller.train(training)
    sums = [{name: value.item() * len(index) for name, value in part.items()} for part, index in zip(found, parts)]
    all_do(nothing)  # another process may read its images for minutes longer
    every_sum = gather_object(sums)
    return {name: math.fsum(part[name] for part in every_sum) / rows for name in every_sum[0]}


def _named(measures: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"val/{name}": value for name, value in measures.items()}


def best_epoch(history: list[dict]) -> dict | None:
    """The epoch with the highest accuracy on validation, without labels the lowest loss; the first of equals.

    None if no epoch was validated.
    """
    validated = [line for line in history if "val/loss" in line]
    return max(validated, key=lambda line: line.get("val/top1", -line["val/loss"]), default=None)


def validate(network: nn.Module, scorer: Scorer | None) -> dict[str, float]:
    """Loss and top-1 accuracy on the validation split; empty if there is none."""
    if scorer is None:
        return {}
    logits = scorer.logits(network)
    labels = scorer.labels.to(logits.device)
    return {"val/loss": metrics.nll(logits, labels), "val/top1": metrics.top_k(logits, labels, 1)}


def score_test_split(
    network: nn.Module,
    others: Weights,
    data: Data,
    job: Job,
    accelerator: Accelerator,
    teacher: TeacherNetwork | None,
) -> tuple[dict, dict[str, Tensor]]:
    """The summary's test keys; and logits and labels, so that later analyses need not read the test split again.

    `others`: further weights of the network by name, "best" and "ema", as far as there are any.

    ImageNet's 50,000 x 1,000 logits take 200 MB, as much as ResNet-50's weights twice; CIFAR-100's take 4 MB.
    """
    predict = Scorer(data.test, data, accelerator, job.fit.batch_size).logits
    logits = predict(network)
    labels = data.test.labels.to(logits.device)
    scores = test_scores(logits, labels)
    if is_imbalanced(data.train.labels.numpy(), len(data.classes)):
        scores |= rare_class_scores(logits, labels, torch.bincount(data.train.labels, minlength=len(data.classes)))
    if others.get("best"):
        with weights_in(network, others["best"]):
            scores["test_top1_best"] = metrics.top_k(predict(network), labels, 1)
    if others.get("ema"):
        with weights_in(network, others["ema"]):
            averaged = test_scores(predict(network), labels)
        scores |= {f"{name}_ema": averaged[name] for name in AVERAGED_SCORES}
    if teacher is not None and teacher.network is not None:
        teacher_logits = predict(teacher.network)
        scores["teacher_test_top1"] = metrics.top_k(teacher_logits, labels, 1)
        scores["agreement"] = metrics.agreement(logits, teacher_logits)
        if teacher.members:
            scores["teachers"] = [
                member_scores(member, predict(member.network), logits, labels) for member in teacher.members
            ]
    return scores, {"logits": logits, "labels": labels}


def member_scores(member: TeacherNetwork, teacher_logits: Tensor, logits: Tensor, labels: Tensor) -> dict:
    """One of several teachers: its accuracy, and the student's agreement with it (percent of test images)."""
    top1, agreement = metrics.top_k(teacher_logits, labels, 1), metrics.agreement(logits, teacher_logits)
    return {"folder": str(member.folder), "test_top1": top1, "agreement": agreement}


def test_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracies and calibration error in percent, likelihood in nats."""
    return {
        "test_top1": metrics.top_k(logits, labels, 1),
        "test_top5": metrics.top_k(logits, labels, 5),
        "test_nll": metrics.nll(logits, labels),
        "test_ece": metrics.ece(logits, labels),
        "test_images": len(labels),
    }
