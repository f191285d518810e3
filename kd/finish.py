"""The end of a run: the test set is read, once, and what others need is written."""

from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from kd import metrics
from kd.config import Job
from kd.curves import draw_curves
from kd.data import Data
from kd.files import write_json, write_weights
from kd.fit import predict
from kd.ledger import Ledger
from kd.losses import Distiller
from kd.run_folder import RunFolder
from kd.teacher import Frozen


def finish(
    distiller: Distiller,
    ledger: Ledger,
    data: Data,
    job: Job,
    accelerator: Accelerator,
    run: RunFolder,
    teacher: Frozen | None,
    control: Path | None,
) -> dict:
    """Score the last and the best-on-validation weights on the test split, and write the run's results.

    summary.json comes last: a run that has one is finished.
    """
    network, labels = distiller.deployed, data.test.labels.to(accelerator.device)
    ask = lambda net: predict(net, data.test, data, accelerator, job.fit.batch_size)  # noqa: E731
    logits = ask(network)
    summary = _training_summary(ledger, job, sum(p.numel() for p in network.parameters()))
    summary |= test_scores(logits, labels)
    summary["test_top1_best"] = None
    if ledger.best:
        last = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.load_state_dict(ledger.best)
        summary["test_top1_best"] = metrics.top_k(ask(network), labels, 1)
        network.load_state_dict(last)
    if job.role != "teacher":
        summary |= {"teacher": None, "teacher_test_top1": None, "control": control and str(control), "agreement": None}
    if teacher is not None:
        theirs = ask(teacher.network)
        summary["teacher"] = str(teacher.folder)
        summary["teacher_test_top1"] = metrics.top_k(theirs, labels, 1)
        summary["agreement"] = metrics.agreement(logits, theirs)
        if teacher.members:
            summary["teachers"] = [_member(member, ask(member.network), logits, labels) for member in teacher.members]
    if accelerator.is_main_process:
        write_weights(run.path / "model.safetensors", network.state_dict())
        if ledger.best:
            write_weights(run.path / "best.safetensors", ledger.best)
        write_json(run.path / "model.json", _model_info(job, data) | {"deployed": distiller.loss.recipe})
        draw_curves(ledger.state.history, f"{job.role} {job.model}", run.path / "curves.png")
        write_json(run.path / "summary.json", summary)
    accelerator.wait_for_everyone()
    return summary


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
    }
