"""The end of a run: the test set is read, once, and what others need is written."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kd import metrics
from kd.compress import compression_summary, plain_weights
from kd.config import Job
from kd.curves import draw_curves
from kd.data import Data
from kd.errors import require
from kd.files import sha256_file, write_json, write_weights
from kd.fit import predict
from kd.images.splits import is_imbalanced
from kd.ledger import LOWER, Ledger
from kd.losses import Distiller
from kd.run_folder import RunFolder
from kd.shots import shot_scores
from kd.teacher import Frozen

# The summary's test keys of a run with --no-test.
UNREAD = dict.fromkeys(("test_top1", "test_top5", "test_nll", "test_ece", "test_images", "test_top1_best"))


def finish(
    distiller: Distiller,
    ledger: Ledger,
    data: Data,
    job: Job,
    accelerator: Accelerator,
    run: RunFolder,
    teacher: Frozen | None,
    control: Path | None,
    compression: dict,
) -> dict:
    """Score the last and the best-on-validation weights on the test split, and write the run's results.

    summary.json comes last: a run that has one is finished. Raises UserError where a score is not finite.
    """
    network = distiller.deployed
    summary = _training_summary(ledger, job, sum(p.numel() for p in network.parameters())) | UNREAD
    summary |= compression_summary(network, job, compression, data.size)
    if job.role != "teacher":
        summary |= _who_taught(teacher) | {"control": control and str(control)}
        summary |= {"teacher_test_top1": None, "agreement": None}
    answers = {}
    if job.run.test:
        scores, answers = _read_test(network, ledger.best, data, job, accelerator, teacher)
        bad = [key for key, value in scores.items() if isinstance(value, float) and not math.isfinite(value)]
        require(not bad, f"{run.path}: {', '.join(bad)} of the trained network is not finite: {LOWER}")
        summary |= scores
    if accelerator.is_main_process:
        if answers:
            write_weights(run.path / "test_logits.safetensors", answers)
        write_weights(run.path / "model.safetensors", plain_weights(network))
        if ledger.best:
            write_weights(run.path / "best.safetensors", plain_weights(network, ledger.best))
        summary["weights_sha256"] = sha256_file(run.path / "model.safetensors")
        info = _model_info(job, data) | {"deployed": distiller.loss.recipe}
        write_json(run.path / "model.json", info | ({"compression": compression} if compression else {}))
        draw_curves(ledger.state.history, f"{job.role} {job.model}", run.path / "curves.png")
        write_json(run.path / "summary.json", summary)
    accelerator.wait_for_everyone()
    return summary


def _read_test(
    network: nn.Module, best: dict[str, Tensor], data: Data, job: Job, accelerator: Accelerator, teacher: Frozen | None
) -> tuple[dict, dict[str, Tensor]]:
    """The summary's test keys; and logits with labels, so that whoever asks later need not read the test split again.

    ImageNet's 50,000 x 1,000 logits take 200 MB, what two sets of ResNet-50's weights take; CIFAR-100's take 4 MB.
    """
    ask = lambda net: predict(net, data.test, data, accelerator, job.fit.batch_size)  # noqa: E731
    logits = ask(network)
    labels = data.test.labels.to(logits.device)
    scores = test_scores(logits, labels)
    if is_imbalanced(data.train.labels.numpy(), len(data.classes)):
        scores |= shot_scores(logits, labels, torch.bincount(data.train.labels, minlength=len(data.classes)))
    if best:
        last = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.load_state_dict(best)
        scores["test_top1_best"] = metrics.top_k(ask(network), labels, 1)
        network.load_state_dict(last)
    if teacher is not None:
        theirs = ask(teacher.network)
        scores["teacher_test_top1"] = metrics.top_k(theirs, labels, 1)
        scores["agreement"] = metrics.agreement(logits, theirs)
        if teacher.members:
            scores["teachers"] = [_member(member, ask(member.network), logits, labels) for member in teacher.members]
    return scores, {"logits": logits, "labels": labels}


def _member(member: Frozen, theirs: Tensor, logits: Tensor, labels: Tensor) -> dict:
    """One of several teachers: how good it is, and how far the student agrees with it (percent of test images)."""
    top1, agreement = metrics.top_k(theirs, labels, 1), metrics.agreement(logits, theirs)
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


def _who_taught(teacher: Frozen | None) -> dict:
    """Folder and network of the teacher; lists of several; None for none."""
    asked = (teacher.members or (teacher,)) if teacher else ()
    told = {"teacher": [str(one.folder) for one in asked], "teacher_model": [one.summary["model"] for one in asked]}
    return {key: found if len(found) > 1 else next(iter(found), None) for key, found in told.items()}


def _training_summary(ledger: Ledger, job: Job, params: int) -> dict:
    state = ledger.state
    validated = [line for line in state.history if "val/top1" in line]
    best = max(validated, key=lambda line: line["val/top1"], default=None)  # the first of equals, as was kept
    timing = state.timing
    return {
        "status": "finished",
        "script": "train_teacher.py" if job.role == "teacher" else "distill_student.py",
        "method": "none" if job.role == "teacher" else job.role,
        "model": job.model,
        "params": params,
        "seed": job.fit.seed,
        "epochs": job.fit.epochs,
        "steps": state.step,
        "processes": [*state.processes_before, state.processes],  # more than one entry: not bit-exact
        "seconds": state.seconds,
        "images_per_second": timing["images"] / timing["seconds"] if timing["seconds"] else None,
        "val_top1_last": validated[-1]["val/top1"] if validated else None,
        "val_top1_best": best["val/top1"] if best else None,
        "best_epoch": best["epoch"] if best else None,
    }


def _model_info(job: Job, data: Data) -> dict:
    return {
        "model": job.model,
        "num_classes": len(data.classes),
        "image_size": data.size,
        "mean": data.mean,
        "std": data.std,
        "classes": data.classes,
        "stored_size": job.data.stored_size,
        "resized": job.origin and job.origin.image_size,  # what a network from elsewhere takes them at, inside
    }
