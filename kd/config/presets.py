"""Presets: recipes that change the flags' defaults, one for teacher and student together."""

import dataclasses
import math

from kd.config.flags import SETTLED_BY_DATA, DataConfig, FitConfig, ViewConfig
from kd.config.jobs import DistillConfig, TrainConfig
from kd.config.methods import KDConfig

# By preset, the defaults that it changes; "teacher" and "student" are networks.
PRESETS: dict[str, dict] = {
    # The report's section 3: 10 epochs, lr 0.001, batch 64, SGD with a schedule, T=5, alpha=0.7.
    "report": {},
    # ResNets at 200 epochs: lr 0.1, batch 128, 5e-4, Nesterov, cosine after a short warm-up; T=4, alpha=0.9.
    "strong": {
        "fit": FitConfig(epochs=200, batch_size=128, lr=0.1, nesterov=True, warmup_epochs=5.0),
        "method": KDConfig(temperature=4.0, alpha=0.9),
    },
    # Tian et al. (arXiv:1910.10699): batch 64, 240 epochs, lr divided by 10 at 150, 180, 210; no validation set.
    # The lr follows from the network: 0.05, or 0.01 for MobileNetV2 and the ShuffleNets (LR_BY_NETWORK).
    "crd": {
        "data": DataConfig(val_fraction=0.0),
        "fit": FitConfig(epochs=240, lr=None, schedule="step", milestones=(150 / 240, 180 / 240, 210 / 240)),
        "method": KDConfig(temperature=4.0, alpha=0.9),
        "teacher": "resnet32x4",
        "student": "resnet8x4",
    },
    # "Consistent and patient" (Beyer et al., arXiv:2106.05237): distillation alone, on mixed images, the same
    # for teacher and student, for very long. Give it a finished --teacher, or one is trained for as long.
    "patient": {
        "views": ViewConfig(mixup=1.0),
        "fit": FitConfig(epochs=1200, batch_size=128, lr=0.1, nesterov=True, warmup_epochs=5.0),
        "method": KDConfig(temperature=1.0, alpha=1.0),
    },
    # Small sets of one's own, from scratch: batch, lr, epochs and warm-up follow from the number of images (`settle`).
    "own": {
        "fit": FitConfig(nesterov=True, **dict.fromkeys(SETTLED_BY_DATA)),
        "method": KDConfig(temperature=4.0, alpha=0.9),
        "control": True,
    },
    # scikit-learn's 1,797 digits of 8 x 8 pixels. Tuned on the validation split (README, "The digits preset").
    "digits": {
        "data": DataConfig(source="digits", val_fraction=0.2),
        "views": ViewConfig(crop_padding=1, flip=False),
        "fit": FitConfig(epochs=30, lr=0.05, nesterov=True, warmup_epochs=2.0),
        "method": KDConfig(temperature=4.0, alpha=0.5),
        "teacher": "resnet20",
        "student": "resnet8",
        "control": True,
    },
}


def train_defaults(preset: str) -> TrainConfig:
    """The defaults of train_teacher.py with this preset."""
    recipe = PRESETS[preset]
    shared = {key: recipe[key] for key in ("data", "views", "fit") if key in recipe}
    return TrainConfig(preset=preset, model=recipe.get("teacher", "resnet34"), **shared)


def distill_defaults(preset: str) -> DistillConfig:
    """The defaults of distill_student.py with this preset."""
    recipe = dict(PRESETS[preset])
    models = {"teacher_model": recipe.pop("teacher", "resnet34"), "student": recipe.pop("student", "resnet18")}
    return DistillConfig(preset=preset, **models, **recipe)


# Without --preset, data other than this is trained by `own`. A test holds the names to those of kd/data/sources.py.
REPORT_DATA = ("cifar100", "uoft-cs/cifar100", "digits", "synthetic")


def default_preset(source: str | None) -> str:
    """The preset for --data `source` (None: left out), if none is given."""
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
