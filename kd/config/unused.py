"""Flags that somebody typed and that change nothing beside the others. No torch here.

Only what is typed counts: a preset's momentum is no mistake beside --optimizer adamw. Flags that some runs of a study
use and others do not (--teacher, --strong-ops, --cache-dtype) are not refused here: lines at the start name them, and
say that --lr-per-256 and --steps stand in place of --lr and --epochs (kd/training/setup.py).
"""

from collections.abc import Iterable

from kd.config.flags import FitConfig
from kd.config.jobs import DistillConfig, TrainConfig
from kd.config.presets import PRESETS, for_teacher
from kd.errors import require

# Flags that say who the teacher is, or how its logits are stored.
OF_A_TEACHER = (
    *("teacher", "teacher-model", "teacher-seed", "teacher-init", "teacher-model-args", "fine-tune-teacher"),
    *("cache-dtype", "cache-top-k"),
)


def check_used(config: TrainConfig | DistillConfig, typed: Iterable[str]) -> None:
    """Raise UserError for a typed flag, by its name on the command line, that another flag makes void."""
    reasons = _of_training(_fits(config)) | _of_views(config) | _of_teacher(config) | _of_labels(config)
    typed = list(typed)
    for name in typed:
        require(name not in reasons, f"--{name}: {reasons.get(name)}")
    _check_rate(config, typed)


def _check_rate(config: TrainConfig | DistillConfig, typed: list[str]) -> None:
    """Raise UserError for a typed --optimizer whose learning rate would be that of the preset's."""
    fit, usual = config.fit, PRESETS[config.preset].get("fit", FitConfig())
    usual = for_teacher(config.preset, "fit", usual) if isinstance(config, TrainConfig) else usual
    kept = (fit.lr, fit.lr_per_256) == (usual.lr, usual.lr_per_256) and not {"lr", "lr-per-256"} & {*typed}
    require(
        "optimizer" not in typed or fit.optimizer == usual.optimizer or not kept or config.preset == "report",
        f"--optimizer {fit.optimizer}: the learning rate of --preset {config.preset} is for {usual.optimizer}; give"
        f" --lr{' (0.001 is usual)' * fit.optimizer.startswith('adam')}",
    )


def _fits(config: TrainConfig | DistillConfig) -> list[FitConfig]:
    """The student's flags of training, and those of the teacher, whose recipe may be another."""
    return [config.fit, *([config.teacher_job().fit] if isinstance(config, DistillConfig) else [])]


def _of_training(fits: list[FitConfig]) -> dict[str, str]:
    """By flag, why no training uses it."""
    fit, found = fits[0], {}
    if all(part.optimizer != "sgd" and not part.optimizer.startswith("timm/") for part in fits):
        found["momentum"] = f"--optimizer {fit.optimizer} takes none; leave it out"
    if all(part.optimizer != "sgd" for part in fits):
        found["nesterov"] = f"is of --optimizer sgd, and this is {fit.optimizer}; leave it out"
    if fit.schedule != "step":
        found["milestones"] = f"needs --schedule step, and this is {fit.schedule}"
    return found


def _of_views(config: TrainConfig | DistillConfig) -> dict[str, str]:
    """By flag, why augmentation does not use it."""
    views, found = config.views, {}
    if views.count == 0:
        found["view-seed"] = "needs --views; without it --seed draws the views"
    if views.resized_crop > 0 and views.crop_padding > 0:
        found["crop-padding"] = f"--resized-crop {views.resized_crop:g} crops in its place; leave one of them out"
    return found


def _of_labels(config: TrainConfig | DistillConfig) -> dict[str, str]:
    """By flag, why it needs the labels that --no-labels leaves out."""
    if not config.data.no_labels or not isinstance(config, DistillConfig):
        return {}
    found = {}
    if config.control:
        found["control"] = "a student alone is trained by labels, and --no-labels leaves them out; leave it out"
    if config.fine_tune_teacher:
        found["fine-tune-teacher"] = "a new last layer is trained by labels, and --no-labels leaves them out"
    return found


def _of_teacher(config: TrainConfig | DistillConfig) -> dict[str, str]:
    """By flag, why the teacher does not use it."""
    if isinstance(config, DistillConfig) and config.cache.cache_from is not None:
        return dict.fromkeys(OF_A_TEACHER, f"{config.cache.cache_from} has the teacher's answers already; leave it out")
    if not isinstance(config, DistillConfig) or not config.teachers:
        return {}
    return {"teacher-seed": f"is of the recipe's own teacher, and {' '.join(config.teachers)} teaches; leave it out"}
