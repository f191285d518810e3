"""The results of a run: test scores, weights, model.json, curves and summary.json."""

import math
from pathlib import Path

from torch import Tensor

from kd.compress import compression_summary, plain_weights
from kd.config import Job
from kd.errors import require
from kd.models import probe
from kd.models.cost import count_params
from kd.report import plots
from kd.runs.checkpoint import State
from kd.runs.results import AVERAGED_SCORES, PROBE_SCORES, TESTED
from kd.teachers.load import TeacherNetwork
from kd.training.evaluate import best_epoch, score_test_split
from kd.training.progress import work_bar
from kd.training.trainer import LOWER_LR_ADVICE, Trainer
from kd.utils.files import sha256_file, write_atomically, write_json, write_weights
from kd.utils.processes import all_do

# The summary's test keys of a run with --no-test.
UNTESTED = dict.fromkeys((*TESTED, "test_top1_best"))


def write_results(trainer: Trainer, teacher: TeacherNetwork | None, control: Path | None) -> dict:
    """Score the last and the best-on-validation weights on the test split, and write the run's results.

    `control` is the run of the student alone. summary.json comes last: a run that has one is finished.
    Raises UserError if a score is not finite.
    """
    job, data, run, accelerator = trainer.job, trainer.data, trainer.run, trainer.accelerator
    network, compression = trainer.distiller.deployed, trainer.distiller.compression
    summary = _training_summary(trainer.state, job, count_params(network)) | UNTESTED
    summary["test_split"] = data.test_split
    if not data.labelled:
        summary |= _unlabelled_summary(trainer.state.history)
    if trainer.average:
        summary |= dict.fromkeys(f"{name}_ema" for name in AVERAGED_SCORES)
        summary["val_top1_ema"] = trainer.state.history[-1].get("val/top1_ema")
    if job.method.embeds:
        summary["embedding"] = probe(network, data.size, job.model).logits.shape[1]
    summary |= compression_summary(network, job, compression, data.size)
    if job.role != "teacher":
        summary |= _teacher_summary(teacher) | {"control": control and str(control)}
        summary |= {"teacher_test_top1": None, "agreement": None}
    test_logits = {}
    if job.run.test and data.labelled:
        others = {"best": trainer.best} | ({"ema": trainer.average.weights} if trainer.average else {})
        scores, test_logits = score_test_split(network, others, data, job, accelerator, teacher)
        bad = [key for key, value in scores.items() if isinstance(value, float) and not math.isfinite(value)]
        require(not bad, f"{run.path}: {', '.join(bad)} of the trained network is not finite: {LOWER_LR_ADVICE}")
        summary |= scores
    summary |= _probe_summary(trainer)
    data.close()
    all_do(lambda: _write(trainer, summary, test_logits) if accelerator.is_main_process else None)
    trainer.tracker.finish(summary)
    return summary


def _write(trainer: Trainer, summary: dict, test_logits: dict[str, Tensor]) -> None:
    """Write the results, after all weights the summary with their hashes."""
    job, run, network = trainer.job, trainer.run, trainer.distiller.deployed
    if test_logits:
        write_weights(run.path / "test_logits.safetensors", test_logits)
    write_weights(run.path / "model.safetensors", plain_weights(network))
    if trainer.best:
        write_weights(run.path / "best.safetensors", plain_weights(network, trainer.best))
    summary["weights_sha256"] = sha256_file(run.path / "model.safetensors")
    if trainer.average:
        write_weights(run.path / "ema.safetensors", plain_weights(network, trainer.average.weights))
        summary["ema_sha256"] = sha256_file(run.path / "ema.safetensors")
    write_json(run.path / "model.json", model_info(trainer))
    draw_curves(trainer.state.history, f"{job.role} {job.model}", run.path / "curves.png")
    write_json(run.path / "summary.json", summary)


def _probe_summary(trainer: Trainer) -> dict:
    """The embedding's scores on the test split of --probe; null with --no-test, and no keys without --probe."""
    if trainer.probe is None:
        return {}
    summary = {"probe_data": trainer.probe.source} | dict.fromkeys(PROBE_SCORES)
    if trainer.job.run.test:
        with work_bar(trainer.accelerator.is_main_process) as told:
            scores = trainer.probe.score(trainer.probe.data.test, told)
        summary |= {f"probe_{name}": score for name, score in scores.items()}
    return summary


def _teacher_summary(teacher: TeacherNetwork | None) -> dict:
    """Folder and network of the teacher: a string for one, a list for several, None for none."""
    members = (teacher.members or (teacher,)) if teacher else ()
    models = [member.summary["model"] for member in members]
    names = {"teacher": _one_or_list(teacher.names if teacher else []), "teacher_model": _one_or_list(models)}
    return names | ({"shared_cache": teacher.shared.record} if teacher and teacher.shared else {})


def _one_or_list(names: list[str]) -> str | list[str] | None:
    return names if len(names) > 1 else next(iter(names), None)


def _training_summary(state: State, job: Job, params: int) -> dict:
    last, best = state.history[-1], best_epoch(state.history) or {}
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
        "val_top1_last": last.get("val/top1"),
        "val_top1_best": best.get("val/top1"),
        "best_epoch": best.get("epoch"),
    }


def _unlabelled_summary(history: list[dict]) -> dict:
    """What a run on data without labels has in place of accuracies: the validation loss, that of distillation."""
    best = best_epoch(history) or {}
    losses = {"val_loss_last": history[-1].get("val/loss"), "val_loss_best": best.get("val/loss")}
    return {"labelled": False, "test_split": None} | losses | {"val_agreement": history[-1].get("val/agreement")}


def model_info(trainer: Trainer) -> dict:
    """The content of model.json: how to build the deployed network, and what it expects of its images."""
    job, data, compression = trainer.job, trainer.data, trainer.distiller.compression
    arguments = {key: value for key, value in job.start.asked.items() if key == "model_args"}
    info = arguments | {
        "model": job.model,
        "num_classes": len(data.classes),
        "image_size": data.size,
        "mean": data.mean,
        "std": data.std,
        "classes": data.classes,
        "stored_size": job.data.stored_size,
        "resized": job.resized,  # what a network from elsewhere takes them at, inside
        "deployed": trainer.distiller.recipe,
    }
    if job.method.embeds:  # it has no classes, and returns so many numbers
        info["embedding"] = probe(trainer.distiller.deployed, data.size, job.model).logits.shape[1]
    return info | ({"compression": compression} if compression else {})


def draw_curves(history: list[dict], title: str, path: Path) -> None:
    """Loss and accuracy over the epochs, as the report draws them, of this run alone."""
    png = plots.render(plots.CURVES, plots.draw_curves({title: [history]}))
    write_atomically(path, lambda partial: partial.write_bytes(png))
