"""What a training needs before its first step: the network, its method, and checks before anything slow."""

import dataclasses
import tempfile
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from kd.compress import compress, sizes
from kd.config import CacheConfig, DistillConfig, FitConfig, Job, TrainConfig, ViewConfig
from kd.config.flags import SETTLED_BY_DATA
from kd.config.jobs import LR_BY_NETWORK, check_together
from kd.config.presets import settle
from kd.data import Data
from kd.data.loader import check_batch
from kd.errors import UserError, require
from kd.losses import Distiller, loss_class
from kd.models import build_model, head_layers, probe, stages
from kd.models.adapt import resize_input
from kd.models.libraries import checkpoint_gradients
from kd.models.pretrained import (
    is_pretrained,
    load_into,
    load_pretrained,
    origin_of,
)
from kd.teachers.load import TeacherNetwork
from kd.training.optimizers import check_network
from kd.training.start import freeze, held_at_first, load_start
from kd.types import Outputs, Pair, Stages
from kd.utils.console import print_once
from kd.utils.rng import seed_everything

ScriptConfig = TypeVar("ScriptConfig", TrainConfig, DistillConfig)


def settle_by_data(config: ScriptConfig, data: Data, accelerator: Accelerator) -> ScriptConfig:
    """The configuration with numbers for all that its recipe leaves to the data, once for every network trained here.

    Prints them, and how many images each epoch leaves out. Raises UserError if the batch does not fit the data.
    """
    images, processes = len(data.train.labels), accelerator.num_processes
    fit = settle(config.fit, images, processes)
    if config.preset in LR_BY_NETWORK and fit.lr_per_256 is None:  # not by the data
        fit = dataclasses.replace(fit, lr=config.fit.lr)
    check_batch(fit, images, processes)
    fit.check()  # a lower bound may lie above the learning rate, which is known by now
    check_together(config.data, config.views, fit)  # and --steps may make fewer epochs than --mix-off-epochs
    if any(getattr(config.fit, name) is None and getattr(fit, name) is not None for name in SETTLED_BY_DATA):
        epochs = f"{fit.epochs} epoch{'s' * (fit.epochs > 1)}, {fit.warmup_epochs:g} of them warm-up"
        numbers = f"{epochs}, batch {fit.batch_size}, lr {fit.lr:g}"
        print_once(f"recipe {config.preset} for {images} training images: {numbers}")
    _print_length(fit, images)
    left_out = images % fit.batch_size
    if left_out and fit.drop_last:
        print_once(
            f"each epoch leaves out {left_out} of {images} training images, others each time: the last batch is"
            " incomplete; --no-drop-last takes it in"
        )
    return dataclasses.replace(config, fit=fit)


def _print_length(fit: FitConfig, images: int) -> None:
    """Say which flags stand in place of others, and whether the learning rate reaches its peak."""
    an_epoch = fit.steps_an_epoch(images)
    if fit.lr_per_256 is not None:
        print_once(f"lr {fit.lr:g} = {fit.lr_per_256:g} per 256 x batch {fit.batch_size}; --lr is not used")
    if fit.steps is not None:
        print_once(f"{fit.steps} steps = {fit.steps / an_epoch:.4g} epochs of {an_epoch} steps; --epochs is not used")
    steps, warmup = fit.total_steps(an_epoch), fit.warmup_epochs * an_epoch
    if warmup > steps:
        print_once(
            f"--warmup-epochs {fit.warmup_epochs:g}: the run has {steps / an_epoch:.4g}, so that the learning rate"
            f" ends at {steps / warmup:.2g} of its peak"
        )


class BuiltNetwork(NamedTuple):
    """A network as its training begins."""

    module: nn.Module
    compression: dict  # the recipe for model.json; empty if it is not compressed


def build_network(job: Job, data: Data) -> BuiltNetwork:
    """The job's network: fresh, from --init's weights, or pretrained with a fresh last layer; compressed, and frozen in
    part.

    A job with --init is one that kd.training.start.start_from has returned, with its data.
    """
    seed_everything(job.fit.seed, "network")
    if job.origin is not None and job.compress.init is None:
        network = with_fresh_head(job, len(data.classes))
    else:
        network = build_model(job.model, len(data.classes), job.resized or data.size, arguments=job.model_args)
    if job.resized not in (None, tuple(data.size)):
        resize_input(network, job.resized)
    if job.fit.gradient_checkpointing:
        checkpoint_gradients(network, job.model)
    fresh_sizes = sizes(network)
    if job.compress.init is not None:
        load_start(network, job, data)
    compression = compress(network, job, data.size, len(data.classes), fresh_sizes)
    freeze(network, job)
    return BuiltNetwork(network, compression)


def with_fresh_head(job: Job, classes: int) -> nn.Module:
    """The job's pretrained network, frozen except for a new last linear layer over `classes`."""
    origin = job.origin
    pretrained = load_pretrained(origin.source, job.model, model_args=job.start.model_args)
    network = build_model(pretrained.model, classes, pretrained.image_size, arguments=job.model_args)
    heads = head_layers(pretrained.model, network, classes)
    require(bool(heads), f"--fine-tune-teacher: {pretrained.model} ends in no linear layer to put in place")
    load_into(network, pretrained, origin.source, heads)
    network.requires_grad_(False)
    for head in heads:
        network.get_submodule(head).requires_grad_(True)
    return network


def head_job(config: DistillConfig, name: str | Path, data: Data) -> tuple[Job, Data] | None:
    """The job that trains a new last layer on a pretrained teacher, and the data normalised as that network expects.

    None without --fine-tune-teacher, or for a run, whose last layer is trained already.
    """
    if not (config.fine_tune_teacher and is_pretrained(str(name))):
        return None
    pretrained = load_pretrained(str(name), config.teacher_model, model_args=config.teacher_model_args)
    job = config.head_job(pretrained.model, origin_of(pretrained, str(name)))
    return job, dataclasses.replace(data, mean=pretrained.mean, std=pretrained.std)


def build_distiller(
    job: Job, data: Data, teacher: TeacherNetwork | None = None, network: BuiltNetwork | None = None
) -> Distiller:
    """The student behind its method's loss; `network` is built here if left out.

    Raises UserError if the method cannot work on these two networks.
    """
    student, compression = network or build_network(job, data)
    seed_everything(job.fit.seed, "method")
    loss = loss_class(job.method)(job.method, probe_networks(job, student, teacher, data))
    distiller = Distiller(student, loss, compression)
    distiller.held = held_at_first(student, job)
    return distiller


def probe_networks(job: Job, student: nn.Module, teacher: TeacherNetwork | None, data: Data) -> Pair:
    """What the job's method gets to know of its networks: their outputs for two grey images, and their layers' names.

    Neither network is changed. Raises: UserError for layers that do not exist or do not pair up.
    """
    layers, classes, labels = loss_class(job.method).layers, len(data.classes), data.train.labels
    student_stages = stages(job.model, student, classes)
    name = loss_class(job.method).partner(job.method, job.model)
    partner = _build_partner(name, job, data) if name else None
    if teacher is None:
        outputs = probe(student, data.size, "student", layers(job.method, student_stages, None)[0])
        return Pair(outputs, None, labels, student_stages, balance=job.fit.balance, partner=partner)
    if teacher.network is None:
        return _pair_of_shared(job, student, student_stages, teacher, data)._replace(partner=partner)
    teacher_stages = stages(teacher.summary["model"], teacher.network, teacher.classes)
    if teacher.members:  # the flags must name the teacher as well: networks.0.layer3
        teacher_stages = Stages(modules=teacher_stages.modules)
    names = layers(job.method, student_stages, teacher_stages)
    outputs = probe(student, data.size, "student", names[0]), probe(teacher.network, data.size, "teacher", names[1])
    classifier = teacher_stages.classifier
    head = teacher.network.get_submodule(classifier) if classifier else None
    return Pair(*outputs, labels, student_stages, teacher_stages, head, job.fit.balance, partner)


def _pair_of_shared(job: Job, student: nn.Module, known: Stages, teacher: TeacherNetwork, data: Data) -> Pair:
    """The pair of a student, with `known` stages, and a teacher of which only logits are here.

    Raises UserError if the method needs more of the teacher.
    """
    try:
        layers, of_teacher = loss_class(job.method).layers(job.method, known, Stages(modules=("?",)))
    except UserError:  # the student's own layers are checked by now: it is the teacher's that are missing
        layers, of_teacher = (), ("its features",)
    require(
        not of_teacher,
        f"{job.role}: compares features of the teacher, and {teacher.shared.source} has its logits alone: give the"
        " network (--teacher RUN) in its place, or take a method that compares logits, such as kd",
    )
    outputs = probe(student, data.size, "student", layers)
    answers = Outputs(torch.zeros(len(outputs.logits), teacher.classes))
    return Pair(outputs, answers, data.train.labels, known, balance=job.fit.balance, width=teacher.shared.width)


def _build_partner(name: str, job: Job, data: Data) -> nn.Module:
    """A fresh network to train beside the student, built as that is if it is of the same name."""
    if name != job.model:
        return build_model(name, len(data.classes), data.size)
    network = build_model(name, len(data.classes), job.resized or data.size, arguments=job.model_args)
    if job.resized not in (None, tuple(data.size)):
        resize_input(network, job.resized)
    return network


def check_job(job: Job, network: BuiltNetwork, data: Data, accelerator: Accelerator) -> None:
    """Raises UserError if `network` cannot be trained as `job` says: labels, layers, output folder."""
    loss = loss_class(job.method)
    require(
        not (job.views.mixes and loss.needs_hard_labels),
        f"{job.role} needs one label for each image: leave --mixup and --cutmix out, or take another method",
    )
    if job.cache.cache_teacher and not job.method.needs_teacher and accelerator.is_main_process:
        print(f"{job.role} has no teacher: --cache-teacher does nothing", flush=True)
    if not job.cache.cache_teacher and job.cache != CacheConfig():
        print_once("--cache-dtype and --cache-top-k change nothing without --cache-teacher")
    if job.views.strong != ViewConfig().strong and not job.method.two_views:
        print_once(f"{job.role} sees one view of each image: the flags of the strong view change nothing")
    require(
        loss.has_cross_entropy or job.method.label_smoothing == 0,
        f"--label-smoothing {job.method.label_smoothing}: changes cross-entropy, and {job.role} has none; leave it out",
    )
    require(
        loss.has_cross_entropy or job.fit.balance in ("none", "sampler"),
        f"--balance {job.fit.balance}: changes cross-entropy, and {job.role} has none; take --balance sampler",
    )
    check_network(network.module, job.fit, job.model)
    layers, _ = loss.layers(job.method, stages(job.model, network.module, len(data.classes)), None)
    probe(network.module, data.size, "student", layers)
    if job.run.out:
        check_writable(Path(job.run.out))


def check_writable(out: Path) -> None:
    """Raises UserError if a new folder `out` could not be made; leaves nothing behind."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        if there != out or not out.is_dir():  # a folder that exists already is checked when the run is opened
            tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error}); choose another --out") from error
