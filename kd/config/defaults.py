"""The flags' defaults: those of a preset, which preset if none is named, and numbers that follow from the data."""

import dataclasses
import math

from kd.config.flags import DataConfig, FitConfig, ViewConfig
from kd.config.jobs import DistillConfig, TrainConfig
from kd.config.methods import METHODS
from kd.config.presets import PRESETS, for_teacher, usual_teacher


def train_defaults(preset: str) -> TrainConfig:
    """The defaults of train_teacher.py with this preset."""
    recipe = PRESETS[preset]
    views = for_teacher(preset, "views", recipe.get("views", ViewConfig()))
    fit = for_teacher(preset, "fit", recipe.get("fit", FitConfig()))
    data = recipe.get("data", DataConfig())
    return TrainConfig(preset=preset, model=usual_teacher(preset), data=data, views=views, fit=fit)


def distill_defaults(preset: str) -> DistillConfig:
    """The defaults of distill_student.py with this preset."""
    recipe = dict(PRESETS[preset])
    models = {"teacher_model": usual_teacher(preset), "student": recipe.pop("student", "resnet18")}
    recipe.pop("teacher", None)
    models["teacher"] = recipe.pop("pretrained", ())
    return DistillConfig(preset=preset, **models, **recipe)


# Without --preset, data other than this is trained by `own`. A test holds the names to those of kd/data/sources.py.
REPORT_DATA = ("cifar100", "uoft-cs/cifar100", "digits", "synthetic")


def default_preset(source: str | None, method: str | None = None) -> str:
    """The preset for --data `source` and the method's name (None: left out), if none is given."""
    if method in METHODS and METHODS[method].embeds:
        return "embed"
    return "report" if source is None or source.partition("@")[0] in REPORT_DATA else "own"


# What `own` aims at. Measured in docs/measurements.md, "The own preset".
STEPS = 10_000  # of the whole run
EPOCHS = (10, 200)  # but no fewer and no more epochs
STEPS_PER_EPOCH = 20  # at least, as far as BATCHES allows
BATCHES = (8, 16, 32, 64)
LR_PER_IMAGE = 0.05 / 64  # grows with the batch (Goyal et al., arXiv:1706.02677)
WARMUP = 0.05  # share of the epochs


def settle(fit: FitConfig, images: int, processes: int) -> FitConfig:
    """`fit` with numbers for what it leaves to the number of training images; what is given stays.

    --steps and --lr-per-256 give the epochs, of which the last may be partial, and the learning rate.
    """
    batch = fit.batch_size or _batch_size(images, processes)
    fit = dataclasses.replace(fit, batch_size=batch)
    steps = max(images // batch, 1)
    epochs = fit.epochs or min(max(round(STEPS / steps), EPOCHS[0]), EPOCHS[1])
    length = epochs
    if fit.steps is not None:
        length = fit.steps / max(fit.steps_an_epoch(images), 1)
        epochs = math.ceil(length)
    lr = LR_PER_IMAGE * batch if fit.peak_lr is None else fit.peak_lr
    warmup = WARMUP * length if fit.warmup_epochs is None else fit.warmup_epochs
    return dataclasses.replace(fit, epochs=epochs, lr=lr, warmup_epochs=warmup)


def _batch_size(images: int, processes: int) -> int:
    """The largest of BATCHES with enough steps an epoch, rounded up to a multiple of the processes."""
    fitting = [size for size in BATCHES if images // size >= STEPS_PER_EPOCH]
    size = min(max(fitting, default=BATCHES[0]), images)
    return -(-size // processes) * processes
