"""Train a network with cross-entropy: a teacher, or anything alone.

    accelerate launch train_teacher.py                   the report's: ResNet34 on CIFAR-100, 10 epochs
    accelerate launch train_teacher.py --preset digits   in seconds, no download
    accelerate launch train_teacher.py --model resnet56 --data my/folder --out runs/big

Accuracies: see the README; CIFAR-100 at full length is not measured yet.
"""

from pathlib import Path

from kd.config import Job, TrainConfig
from kd.config.cli import script
from kd.config.presets import train_defaults


def train(job: Job, data, accelerator, teacher=None, control: Path | None = None) -> Path:
    """Train one network as `job` says, or find it trained already; returns its run folder.

    `teacher` (kd.teacher.Frozen) is asked live or through its cache; `control` is the run of the student alone, for
    the summary.
    """
    from kd.losses import LOSSES
    from kd.losses.base import Distiller
    from kd.runs.folder import open_run
    from kd.teachers.cache import answers
    from kd.training.setup import probe_pair, start_network
    from kd.training.summary import finish
    from kd.training.tracking import Tracker
    from kd.training.trainer import fit
    from kd.utils.processes import same_threads
    from kd.utils.rng import seed_everything

    run = open_run(job, data, accelerator, teacher and teacher.sha256)
    with run, same_threads():
        if run.summary is None:
            seed_everything(job.fit.seed, "network")
            network, compression = start_network(job, data)
            seed_everything(job.fit.seed, "method")
            loss = LOSSES[job.method_name](job.method, probe_pair(job, network, teacher, data))
            distiller = Distiller(network, loss)
            tracker = Tracker(job, run, accelerator)
            answer = answers(teacher, data, job, accelerator, loss.teacher_layers) if teacher else None
            ledger = fit(distiller, data, job, accelerator, run, tracker, answer)
            tracker.finish(finish(distiller, ledger, data, job, accelerator, run, teacher, control, compression))
            accelerator.free_memory()
    return run.path


def main(config: TrainConfig) -> None:
    from kd.data import load_data
    from kd.models import check_name
    from kd.runs.table import show_results
    from kd.training.launch import start
    from kd.training.setup import try_out

    check_name(config.model)
    accelerator = start(config.fit, config.run)
    data = load_data(config.data)
    try_out(config.job(), data, accelerator)
    folder = train(config.job(), data, accelerator)
    if accelerator.is_main_process:
        show_results(folder)


if __name__ == "__main__":
    script(train_defaults, main, __doc__)
