"""What a training needs before its first step: the network, its method, and checks before anything slow."""

import dataclasses
import tempfile
from pathlib import Path
from typing import NamedTuple, TypeVar

from accelerate import Accelerator
from torch import nn

from kd.compress import compress, sizes
from kd.compress.prune import resize
from kd.config import DistillConfig, Job, TrainConfig
from kd.config.flags import SETTLED_BY_DATA
from kd.config.presets import settle
from kd.data import Data
from kd.data.loader import check_batch
from kd.errors import UserError, require
from kd.losses import LOSSES, Distiller
from kd.models import build_model, probe, stages
from kd.models.adapt import resize_input
from kd.models.libraries import checkpoint_gradients
from kd.models.pretrained import (
    is_pretrained,
    load_into,
    load_pretrained,
    origin_of,
)
from kd.runs.results import read_model
from kd.teachers.load import TeacherNetwork
from kd.training.optimizers import check_network
from kd.types import Pair, Stages
from kd.utils.console import print_once
from kd.utils.files import load_weights
from kd.utils.rng import seed_everything

ScriptConfig = TypeVar("ScriptConfig", TrainConfig, DistillConfig)


def settle_by_data(config: ScriptConfig, data: Data, accelerator: Accelerator) -> ScriptConfig:
    """The configuration with numbers for all that its recipe leaves to the data, once for every network trained here.

    Prints them, and how many images each epoch leaves out. Raises UserError if the batch does not fit the data.
    """
    images, processes = len(data.train.labels), accelerator.num_processes
    fit = settle(config.fit, images, processes)
    check_batch(fit, images, processes)
    fit.check()  # a lower bound may lie above the learning rate, which is known by now
    if any(getattr(config.fit, name) is None for name in SETTLED_BY_DATA):
        epochs = f"{fit.epochs} epoch{'s' * (fit.epochs > 1)}, {fit.warmup_epochs:g} of them warm-up"
        numbers = f"{epochs}, batch {fit.batch_size}, lr {fit.lr:g}"
        print_once(f"recipe {config.preset} for {images} training images: {numbers}")
    if fit.lr_per_256 is not None:
        print_once(f"lr {fit.lr:g} = {fit.lr_per_256:g} per 256 x batch {fit.batch_size}; --lr is not used")
    if fit.steps is not None:
        an_epoch = fit.steps_an_epoch(images)
        print_once(f"{fit.steps} steps = {fit.steps / an_epoch:.4g} epochs of {an_epoch} steps; --epochs is not used")
    left_out = images % fit.batch_size
    if left_out and fit.drop_last:
        print_once(
            f"each epoch leaves out {left_out} of {images} training images, others each time: the last batch is"
            " incomplete; --no-drop-last takes it in"
        )
    return dataclasses.replace(config, fit=fit)


class BuiltNetwork(NamedTuple):
    """A network as its training begins."""

    module: nn.Module
    compression: dict  # the recipe for model.json; empty if it is not compressed


def build_network(job: Job, data: Data) -> BuiltNetwork:
    """The job's network: fresh, from --init's weights, or pretrained with a fresh last layer; then compressed."""
    seed_everything(job.fit.seed, "network")
    if job.origin is None:
        network = build_model(job.model, len(data.classes), data.size)
    else:
        network = with_fresh_head(job, len(data.classes))
        if job.origin.image_size != tuple(data.size):
            resize_input(network, job.origin.image_size)
    if job.fit.gradient_checkpointing:
        checkpoint_gradients(network, job.model)
    fresh_sizes = sizes(network)
    if job.compress.init is not None:
        load_initial_weights(network, Path(job.compress.init), job, data)
    return BuiltNetwork(network, compress(network, job, data.size, len(data.classes), fresh_sizes))


def load_initial_weights(network: nn.Module, folder: Path, job: Job, data: Data) -> None:
    """Load a finished run's weights, and for a pruned one its shapes. Raises UserError if they do not fit the job."""
    require(not folder.is_file(), f"--init {folder}: is a file; name the folder of a finished run")
    require(folder.is_dir(), f"--init {folder}: no such run folder; name where that run lies now")
    info, _ = read_model(folder)
    model, recipe = info["model"], info.get("compression") or {}
    require(model == job.model, f"--init {folder}: is a {model}, not a {job.model}; name a run of the same model")
    deployed = info.get("deployed") or {}
    require(not deployed, f"--init {folder}: {deployed.get('method')} added to its network; name another run")
    classes, size = list(data.classes), list(data.size)
    require(
        (info["classes"], list(info["image_size"])) == (classes, size),
        f"--init {folder}: was trained on {len(info['classes'])} classes in images of {info['image_size']}, this data"
        f" has {len(classes)} in images of {size}, or classes of other names; name a run on the same data",
    )
    try:
        sparsity = float(recipe.get("sparsity", 0.0))
        resize(network, recipe.get("shapes", {}))
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder / 'model.json'}: compression {recipe} cannot be rebuilt ({error!r})") from error
    require(
        job.compress.sparsity >= sparsity,
        f"--init {folder}: has a sparsity of {sparsity}, which training would fill again; add --sparsity {sparsity}",
    )
    load_weights(network, folder / "model.safetensors")


def with_fresh_head(job: Job, classes: int) -> nn.Module:
    """The job's pretrained network, frozen except for a new last linear layer over `classes`."""
    origin = job.origin
    pretrained = load_pretrained(origin.source, job.model)
    network = build_model(pretrained.model, classes, pretrained.image_size)
    head = stages(pretrained.model, network, classes).classifier
    require(head is not None, f"--fine-tune-teacher: {pretrained.model} ends in no linear layer to put in place")
    load_into(network, pretrained, origin.source, head)
    network.requires_grad_(False).get_submodule(head).requires_grad_(True)
    return network


def head_job(config: DistillConfig, name: str | Path, data: Data) -> tuple[Job, Data] | None:
    """The job that trains a new last layer on a pretrained teacher, and the data normalised as that network expects.

    None without --fine-tune-teacher, or for a run, whose last layer is trained already.
    """
    if not (config.fine_tune_teacher and is_pretrained(str(name))):
        return None
    pretrained = load_pretrained(str(name), config.teacher_model)
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
    loss = LOSSES[job.method_name](job.method, probe_networks(job, student, teacher, data))
    return Distiller(student, loss, compression)


def probe_networks(job: Job, student: nn.Module, teacher: TeacherNetwork | None, data: Data) -> Pair:
    """What the job's method gets to know of its networks: their outputs for two grey images, and their layers' names.

    Neither network is changed. Raises: UserError for layers that do not exist or do not pair up.
    """
    layers, classes, labels = LOSSES[job.method_name].layers, len(data.classes), data.train.labels
    student_stages = stages(job.model, student, classes)
    if teacher is None:
        name = LOSSES[job.method_name].partner(job.method, job.model)
        partner = build_model(name, classes, data.size) if name else None
        outputs = probe(student, data.size, "student", layers(job.method, student_stages, None)[0])
        return Pair(outputs, None, labels, student_stages, balance=job.fit.balance, partner=partner)
    teacher_stages = stages(teacher.summary["model"], teacher.network, teacher.classes)
    if teacher.members:  # the flags must name the teacher as well: networks.0.layer3
        teacher_stages = Stages(modules=teacher_stages.modules)
    names = layers(job.method, student_stages, teacher_stages)
    outputs = probe(student, data.size, "student", names[0]), probe(teacher.network, data.size, "teacher", names[1])
    classifier = teacher_stages.classifier
    head = teacher.network.get_submodule(classifier) if classifier else None
    return Pair(*outputs, labels, student_stages, teacher_stages, head, job.fit.balance)


def check_job(job: Job, network: BuiltNetwork, data: Data, accelerator: Accelerator) -> None:
    """Raises UserError if `network` cannot be trained as `job` says: labels, layers, output folder."""
    loss = LOSSES[job.method_name]
    require(
        not (job.views.mixes and loss.needs_hard_labels),
        f"{job.role} needs one label for each image: leave --mixup and --cutmix out, or take another method",
    )
    if job.cache.cache_teacher and not job.method.needs_teacher and accelerator.is_main_process:
        print(f"{job.role} has no teacher: --cache-teacher does nothing", flush=True)
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
