"""Distil a teacher into a student.

    accelerate launch distill_student.py                    ResNet34 -> ResNet18, as in the report
    accelerate launch distill_student.py --preset digits    the same chain in seconds, no download
    accelerate launch distill_student.py --data my/folder   your own images, as SPLIT/CLASS/*.jpg
    accelerate launch distill_student.py --teacher runs/big --student resnet20 dkd --beta 2
    accelerate launch distill_student.py --resume           continue the first after a kill

resnet20 -> resnet8 on digits: 99.16% test top-1, 99.16% alone (seed 0, last epoch, one CPU core);
resnet34 -> resnet18 on CIFAR-100, the report's ten epochs: 24.50%, 26.94% alone (seed 0, bf16)
"""

import dataclasses
from pathlib import Path

from kd.config import DistillConfig
from kd.config.cli import script
from kd.config.defaults import distill_defaults
from train_teacher import train


def find_teacher(config: DistillConfig, data, seen, accelerator, shared=None):
    """The teacher: the `shared` logits of --cache-teacher SOURCE; else --teacher, with a new last layer if asked for;
    else what a pruned student was before; else the recipe's own, trained here unless it is already. `seen` is `data` as
    the student sees it."""
    from kd.config.presets import usual_teacher
    from kd.runs.held_out import check_held_out
    from kd.teachers.load import load_embedders, load_teachers
    from kd.teachers.shared import shared_teacher
    from kd.training.setup import head_job
    from kd.training.start import TEACHER_START, start_from

    if shared:
        return shared_teacher(shared, config.job(), seen)
    for name in config.teachers:
        check_held_out(name, f"--teacher {name}", config.data, data)
    names = list(config.teachers)
    names = names or [train(*start_from(config.teacher_job(), data, TEACHER_START), accelerator)]
    jobs = [head_job(config, name, data) for name in names]
    names = [train(*job, accelerator) if job else name for name, job in zip(names, jobs, strict=True)]
    own = not config.is_taught_by_named or all(jobs)  # trained here, or named by --init
    trusted = config.trust_code or own
    model, arguments = config.teacher_model, config.teacher_model_args
    load = load_embedders if config.method.embeds else load_teachers
    given = {"teacher_model": model, "teacher_model_args": arguments}
    usual = {"teacher_model": usual_teacher(config.preset), "teacher_model_args": None}
    flags = {name: value for name, value in given.items() if config.teachers and value != usual[name]}
    return load(names, seen, accelerator.device, trusted, model, arguments)._replace(flags=flags)


def main(config: DistillConfig) -> Path:
    from kd.data import load_data
    from kd.runs.table import show_results
    from kd.teachers.shared import find_shared
    from kd.training import setup
    from kd.training.launch import make_accelerator, print_plan
    from kd.training.start import check_networks, start_from

    config, needs_teacher, source = config.for_method(), config.method.needs_teacher, config.cache.cache_from
    config = setup.settle_unlabelled(config) if config.data.no_labels else config
    check_networks(config)
    teachers = (source,) if source else config.teachers or (config.teacher_model,)
    print_plan(config.job(), teachers if needs_teacher else (), config.control)
    accelerator = make_accelerator(config.fit, config.run)
    shared = find_shared(config.job()) if needs_teacher and source else None
    data = load_data(config.data, config.run, config.method.uses_labels)
    config = setup.settle_by_data(config, data, accelerator)
    data = setup.name_classes(config, data, shared.identity["class_names"] if shared else ())
    job, seen = start_from(config.job(), data)
    network = setup.build_network(job, seen)
    setup.check_job(job, network, seen, accelerator)
    teacher = find_teacher(config, data, seen, accelerator, shared) if needs_teacher else None
    distiller = setup.build_distiller(job, seen, teacher, network)
    alone = dataclasses.replace(config.control_job(), origin=job.origin)
    control = train(alone, seen, accelerator) if config.control and job.method_name != "none" else None
    folder = train(job, seen, accelerator, distiller, teacher, control)
    if accelerator.is_main_process:
        show_results(folder, control)
    return folder


if __name__ == "__main__":
    script(distill_defaults, main, __doc__)
