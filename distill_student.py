"""Distil a teacher into a student.

    accelerate launch distill_student.py                  the report: CIFAR-100, ResNet34 -> ResNet18, T=5, alpha=0.7
    accelerate launch distill_student.py --preset digits  the same chain in seconds, on data that needs no download
    accelerate launch distill_student.py --teacher runs/big --student resnet20 kd --temperature 4

Accuracies: see the README; CIFAR-100 at full length is not measured yet.
"""

from kd.config import DistillConfig
from kd.config.cli import script
from kd.config.presets import distill_defaults
from train_teacher import train


def find_teacher(config: DistillConfig, data, accelerator):
    """Those named by --teacher, with a new last layer if asked; else a pruned network's own; else the recipe's, trained
    if need be."""
    from kd.teachers.load import load_teachers
    from kd.training.setup import head_task

    names = list(config.teachers) or [train(config.teacher_job(), data, accelerator)]
    tasks = [head_task(config, name, data) for name in names]
    names = [train(*task, accelerator) if task else name for name, task in zip(names, tasks, strict=True)]
    trusted = config.trust_code or not config.teacher or all(tasks)  # what was trained here runs the user's own code
    return load_teachers(names, data, accelerator.device, trusted, config.teacher_model)


def main(config: DistillConfig) -> None:
    from kd.data import load_data
    from kd.models import check_name
    from kd.runs.table import show_results
    from kd.teachers.load import check_teachers
    from kd.training.launch import start
    from kd.training.setup import try_method, try_out

    job, needs_teacher = config.job(), config.method.needs_teacher
    check_name(config.student)
    if needs_teacher and config.teachers:
        check_teachers(config)
    elif needs_teacher:
        check_name(config.teacher_model)
    accelerator = start(config.fit, config.run)
    data = load_data(config.data)
    student = try_out(job, data, accelerator)
    teacher = find_teacher(config, data, accelerator) if needs_teacher else None
    try_method(job, student, teacher, data)
    control = train(config.control_job(), data, accelerator) if config.control and job.method_name != "none" else None
    folder = train(job, data, accelerator, teacher, control)
    if accelerator.is_main_process:
        show_results(folder, control)


if __name__ == "__main__":
    script(distill_defaults, main, __doc__)
