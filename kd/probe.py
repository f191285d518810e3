"""Trying things before anything expensive starts."""

import tempfile
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from kd.batches import check_batch
from kd.compress import compress
from kd.config import Job
from kd.data import Data
from kd.errors import UserError, require
from kd.losses import LOSSES
from kd.models import build_model, probe, stages
from kd.outputs import Pair, Stages
from kd.teacher import Frozen


def probe_pair(job: Job, student: nn.Module, teacher: Frozen | None, data: Data) -> Pair:
    """What the job's method may know of its networks: both ones' outputs on two grey images, and where they come from.

    Neither network is changed. Raises: UserError for layers that are not there, or that do not pair up.
    """
    layers, classes, labels = LOSSES[job.method_name].layers, len(data.classes), data.train.labels
    ours = stages(job.model, student, classes)
    if teacher is None:
        name = LOSSES[job.method_name].partner(job.method, job.model)
        partner = build_model(name, classes, data.size) if name else None
        outputs = probe(student, data.size, "student", layers(job.method, ours, None)[0])
        return Pair(outputs, None, labels, ours, balance=job.fit.balance, partner=partner)
    theirs = stages(teacher.summary["model"], teacher.network, teacher.classes)
    if teacher.members:  # whose features are meant, the flags must say: networks.0.layer3
        theirs = Stages(modules=theirs.modules)
    names = layers(job.method, ours, theirs)
    outputs = probe(student, data.size, "student", names[0]), probe(teacher.network, data.size, "teacher", names[1])
    head = teacher.network.get_submodule(theirs.classifier) if theirs.classifier else None
    return Pair(*outputs, labels, ours, theirs, head, job.fit.balance)


def try_out(job: Job, data: Data, accelerator: Accelerator) -> nn.Module:
    """Raises UserError where the job could not start later: its network, layers, batch, folder. Trains nothing.

    Returns such a network as will be trained, for `try_method`.
    """
    require(
        not (job.views.mixes and LOSSES[job.method_name].needs_hard_labels),
        f"{job.role} needs one label for each image: leave --mixup and --cutmix out, or take another method",
    )
    if job.cache.cache_teacher and not job.method.needs_teacher and accelerator.is_main_process:
        print(f"{job.role} asks no teacher: --cache-teacher has nothing to keep", flush=True)
    require(
        LOSSES[job.method_name].has_cross_entropy or job.fit.balance in ("none", "sampler"),
        f"--balance {job.fit.balance}: changes cross-entropy, and {job.role} has none; take --balance sampler",
    )
    network = build_model(job.model, len(data.classes), data.size)
    compress(network, job, data)
    layers, _ = LOSSES[job.method_name].layers(job.method, stages(job.model, network, len(data.classes)), None)
    probe(network, data.size, "student", layers)
    check_batch(job.fit.batch_size, len(data.train.labels), accelerator.num_processes)
    if job.run.out:
        out = Path(job.run.out)
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        try:
            if there != out or not out.is_dir():  # one that is there is its run's to judge
                tempfile.TemporaryDirectory(dir=there).cleanup()  # what is refused later must leave nothing behind
        except OSError as error:
            raise UserError(f"cannot write to {out} ({error}); choose another --out") from error
    return network


def try_method(job: Job, student: nn.Module, teacher: Frozen | None, data: Data) -> None:
    """Raises UserError where the job's method cannot work on student and teacher; its folder is still untouched."""
    LOSSES[job.method_name](job.method, probe_pair(job, student, teacher, data))
