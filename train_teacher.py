"""Train a network with cross-entropy: a teacher, or any network alone.

    accelerate launch train_teacher.py                     the report's ResNet34 on CIFAR-100
    accelerate launch train_teacher.py --preset digits     in seconds, no download
    accelerate launch train_teacher.py --data my/folder    your own images, as SPLIT/CLASS/*.jpg
    accelerate launch train_teacher.py --model resnet56 --preset strong --out runs/big
    accelerate launch train_teacher.py --resume            continue the first after a kill

resnet20 on digits: 99.44% test top-1 (seed 0, last epoch, one CPU core);
resnet34 on CIFAR-100, the report's ten epochs: 29.57% (seed 0, last epoch, bf16)
"""

from pathlib import Path

from kd.config import Job, TrainConfig
from kd.config.cli import script
from kd.config.defaults import train_defaults


def train(job: Job, data, accelerator, distiller=None, teacher=None, control: Path | None = None) -> Path:
    """Train one network as `job` says, or find it trained already; returns its run folder.

    `distiller` is the network behind its method's loss, built here if left out. `teacher` is a
    kd.teachers.load.TeacherNetwork; `control` the run of the student alone, for the summary.
    """
    from kd.runs.folder import RunInputs, open_run
    from kd.training.push import push_run
    from kd.utils.processes import same_threads

    taught = (teacher.sha256, teacher.folders) if teacher else (None, ())
    shared = teacher.shared.record if teacher and teacher.shared else {}
    flags = teacher.flags if teacher else {}
    inputs = RunInputs(*taught, distiller.loss.identity() if distiller else {}, shared, flags)
    run = open_run(job, data, accelerator, inputs)
    with run, same_threads():
        if run.summary is None:
            run_epochs(job, data, accelerator, run, distiller, teacher, control)
            accelerator.free_memory()  # what the training held on the GPU is out of use by now
        if accelerator.is_main_process:
            push_run(job, run)
    return run.path


def run_epochs(job: Job, data, accelerator, run, distiller=None, teacher=None, control: Path | None = None) -> None:
    """The training loop, from the run's last checkpoint if it has one; then the results. Arguments as for `train`."""
    from kd.teachers.cache import teacher_logits, validation_teacher
    from kd.training.push import push_epoch
    from kd.training.setup import build_distiller
    from kd.training.summary import write_results
    from kd.training.trainer import Trainer

    distiller = distiller or build_distiller(job, data)
    layers = distiller.loss.teacher_layers
    logits = teacher and teacher_logits(teacher, data, job, accelerator, layers)
    live = teacher and validation_teacher(teacher, logits, data, job, accelerator, layers)
    with Trainer(job, data, accelerator, run, distiller, logits, live) as trainer:
        for epoch in trainer.epochs():
            for batch in trainer.batches(epoch):
                trainer.step(batch)
            trainer.end_epoch(epoch)
            push_epoch(trainer, epoch)
    write_results(trainer, teacher, control)


def main(config: TrainConfig) -> Path:
    from kd.data import load_data
    from kd.models import check_name
    from kd.runs.table import show_results
    from kd.training.launch import make_accelerator, print_plan
    from kd.training.setup import build_distiller, build_network, check_job, settle_by_data, settle_unlabelled
    from kd.training.start import check_start, start_from

    config = settle_unlabelled(config) if config.data.no_labels else config
    check_name(config.model)
    check_start(config.job())
    print_plan(config.job())
    accelerator = make_accelerator(config.fit, config.run)
    data = load_data(config.data, config.run)
    config = settle_by_data(config, data, accelerator)
    job, data = start_from(config.job(), data)
    network = build_network(job, data)
    check_job(job, network, data, accelerator)
    folder = train(job, data, accelerator, build_distiller(job, data, network=network))
    if accelerator.is_main_process:
        show_results(folder)
    return folder


if __name__ == "__main__":
    script(train_defaults, main, __doc__)
