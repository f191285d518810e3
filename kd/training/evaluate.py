"""Scoring a network on the validation split and, once, on the test split."""

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from kd import metrics
from kd.config import Job
from kd.data import Data
from kd.data.loader import Pixels
from kd.data.rows import Rows
from kd.data.splits import is_imbalanced
from kd.metrics import rare_class_scores
from kd.runs.checkpoint import Weights
from kd.runs.results import AVERAGED_SCORES
from kd.teachers.load import TeacherNetwork
from kd.training.average import weights_in
from kd.utils.processes import broadcast_buffers


@torch.no_grad()
def predict_logits(
    network: nn.Module, split: Rows, data: Data, accelerator: Accelerator, batch_size: int
) -> Float[Tensor, "n k"]:
    """The network's logits for every row of the split, in eval mode; all processes share the work and get all rows.

    One process writes each row and the others leave it zero, so that the sum over processes has every row exactly once.
    """
    training = network.training
    network.eval()
    broadcast_buffers(network)
    pixels = Pixels(split, data, accelerator.device)
    rows = len(split.labels)
    logits = torch.zeros(rows, len(data.classes), device=accelerator.device)
    share = max(batch_size // accelerator.num_processes, 1)
    starts = range(accelerator.process_index * share, rows, accelerator.num_processes * share)
    place = pixels.split.labels.device  # an index from elsewhere would be copied there in every batch
    indices = [torch.arange(start, min(start + share, rows), device=place) for start in starts]
    for start, images in zip(starts, pixels.centre_crops(indices)):
        with accelerator.autocast():
            logits[start : start + share] = network(images).float()
    network.train(training)
    total = accelerator.reduce(logits, "sum")
    return total.cpu() if total.device.type == "mps" else total  # MPS has no float64, which scoring uses


def validate(network: nn.Module, data: Data, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
    """Loss and top-1 accuracy on the validation split; empty if there is none."""
    if data.val is None:
        return {}
    logits = predict_logits(network, data.val, data, accelerator, batch_size)
    labels = data.val.labels.to(logits.device)
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
    predict = lambda net: predict_logits(net, data.test, data, accelerator, job.fit.batch_size)  # noqa: E731
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
