"""The presets of --preset: the defaults that each changes, and what its teacher is trained with. No torch here."""

import dataclasses
from typing import TypeVar

from kd.config.flags import SETTLED_BY_DATA, DataConfig, FitConfig, StartConfig, ViewConfig
from kd.config.methods import DeiTConfig, EmbedConfig, KDConfig

Flags = TypeVar("Flags", FitConfig, ViewConfig)

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
    # scikit-learn's 1,797 digits of 8 x 8 pixels. Tuned on the validation split (docs/measurements.md).
    "digits": {
        "data": DataConfig(source="digits", val_fraction=0.2),
        "views": ViewConfig(crop_padding=1, flip=False),
        "fit": FitConfig(epochs=30, lr=0.05, nesterov=True, warmup_epochs=2.0),
        "method": KDConfig(temperature=4.0, alpha=0.5),
        "teacher": "resnet20",
        "student": "resnet8",
        "control": True,
    },
    # Aims at 82% with ResNet18 on CIFAR-100 (published: 82.3 with learned mixing and 800 epochs): a far better teacher,
    # the same mixed views for both networks, standardised kd (arXiv:2403.01427), averaged weights.
    "modern": {
        "views": ViewConfig(policy="trivial", mixup=1.0, cutmix=1.0),
        "fit": FitConfig(
            epochs=300,
            batch_size=128,
            lr=0.1,
            nesterov=True,
            warmup_epochs=5.0,
            decay_norm_and_bias=False,
            ema=0.999,
        ),
        "method": KDConfig(temperature=2.0, alpha=0.9, boost=10.0, standardize=True),
        "teacher": "wrn-28-10",
    },
    # What the report's ten epochs can give. Tuned on validation with small networks (docs/measurements.md, Ten epochs).
    "quick": {
        "views": ViewConfig(alternating_flip=True),
        "fit": FitConfig(
            lr=0.2,
            nesterov=True,
            batch_size=128,
            schedule="one-cycle",
            warmup_epochs=2.0,
            decay_norm_and_bias=False,
        ),
        "method": KDConfig(temperature=4.0, alpha=0.5, label_smoothing=0.1),
    },
    # Small transformers from scratch: DeiT's optimizer, mixing and second head (arXiv:2012.12877), for 32 x 32 pixels.
    "vit": {
        "views": ViewConfig(policy="trivial", mixup=0.8, cutmix=1.0, erase=0.25),
        "fit": FitConfig(
            epochs=200,
            batch_size=128,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.05,
            decay_norm_and_bias=False,
            warmup_epochs=10.0,
            min_lr=1e-5,
            clip_norm=1.0,
            ema=0.999,
        ),
        "method": DeiTConfig(),
        "student": "timm/deit_tiny_distilled_patch16_224",
        "start": StartConfig(model_args="patch_size=4"),
    },
    # The literature's: 100 epochs, lr 0.1 per 256 images, divided by 10 at 30, 60 and 90, T=1, alpha=0.5; torchvision's
    # own ResNet34 teaches (mdistiller's configs/imagenet/r34_r18).
    "imagenet": {
        "data": DataConfig(source="imagenet-1k", val_fraction=0.0),
        "views": ViewConfig(resized_crop=0.08),
        "fit": FitConfig(
            epochs=100, batch_size=512, lr=0.2, weight_decay=1e-4, schedule="step", milestones=(0.3, 0.6, 0.9)
        ),
        "method": KDConfig(temperature=1.0, alpha=0.5),
        "teacher": "torchvision/resnet34",
        "student": "torchvision/resnet18",
        "pretrained": ("torchvision/resnet34",),
    },
    # Embeddings of a foundation model, without labels: the field's mixing and length; the batch follows from the number
    # of images. Not tuned; six epochs of it are in docs/measurements.md.
    "embed": {
        "views": ViewConfig(resized_crop=0.25, mixup=1.0),
        "fit": FitConfig(
            epochs=100,
            batch_size=None,
            optimizer="adamw",
            lr=5e-4,
            weight_decay=0.05,
            decay_norm_and_bias=False,
            warmup_epochs=None,
            clip_norm=1.0,
        ),
        "method": EmbedConfig(),
    },
}

# A ResNet's recipe, for teachers of presets whose own does not suit one.
CONVOLUTIONAL = {
    "optimizer": "sgd",
    "lr": 0.1,
    "nesterov": True,
    "weight_decay": 5e-4,
    "warmup_epochs": 5.0,
    "min_lr": 0.0,
    "clip_norm": None,
}

# By preset, the flags that its teacher has otherwise than its student.
TEACHERS: dict[str, dict[str, dict]] = {
    # WRN-28-8 with cutmix has reached 84.5.
    "modern": {"views": {"policy": "none", "mixup": 0.0}, "fit": {"epochs": 200}},
    "vit": {"views": {"policy": "none", "mixup": 0.0, "erase": 0.0}, "fit": CONVOLUTIONAL},
    "embed": {"views": {"mixup": 0.0}},  # for train_teacher.py: a student's teacher of embeddings is never trained
}


def usual_teacher(preset: str) -> str:
    """The preset's default of --teacher-model."""
    return PRESETS[preset].get("teacher", "resnet34")


def for_teacher(preset: str, part: str, flags: Flags) -> Flags:
    """One part of the flags, with the teacher's own values for those that are left at the preset's."""
    usual = PRESETS[preset].get(part, type(flags)())
    own = TEACHERS.get(preset, {}).get(part, {})
    left = {name: value for name, value in own.items() if getattr(flags, name) == getattr(usual, name)}
    if getattr(flags, "steps", None) is not None:  # the epochs follow from the steps
        left.pop("epochs", None)
    if getattr(flags, "optimizer", None) != getattr(usual, "optimizer", None):  # a rate is given for that one
        left.pop("lr", None)
    return dataclasses.replace(flags, **left)
