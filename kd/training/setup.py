"""What a training needs before its first step: the network, its method, and checks before anything slow."""

import copy
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from kd.compress import compress, sizes
from kd.config import CacheConfig, DistillConfig, FitConfig, Job, TrainConfig, ViewConfig
from kd.config.defaults import settle
from kd.config.flags import SETTLED_BY_DATA
from kd.config.jobs import LR_BY_NETWORK, check_together
from kd.config.methods import DISTConfig, MethodFlags, MLKDConfig, method_name, methods_without_labels
from kd.config.named import CombinedFlags
from kd.data import Data
from kd.data.loader import check_batch
from kd.errors import UserError, require
from kd.losses import DistillationLoss, Distiller, loss_class
from kd.models import build_model, check_one_image, head_layers, probe, stages
from kd.models.adapt import check_batchnorm, resize_input
from kd.models.libraries import checkpoint_gradients
from kd.models.pretrained import is_pretrained, load_into, load_pretrained, origin_of
from kd.runs.folder import check_folder
from kd.runs.results import read_model
from kd.teachers.load import TeacherNetwork
from kd.training.optimizers import check_network
from kd.training.start import freeze, held_at_first, load_start
from kd.types import Outputs, Pair, Stages
from kd.utils.console import print_once
from kd.utils.hub import local_folder
from kd.utils.processes import all_do, from_main
from kd.utils.rng import seed_everything
from kd.utils.system import expand_user
from kd.utils.users_own import is_module_function

FEW_IMAGES = 32  # of a process; with fewer BatchNorm's error rises (Wu and He, arXiv:1803.08494, figure 1)

ScriptConfig = TypeVar("ScriptConfig", TrainConfig, DistillConfig)


def settle_by_data(config: ScriptConfig, data: Data, accelerator: Accelerator) -> ScriptConfig:
    """The configuration with numbers for all that its recipe leaves to the data, once for every network trained here.

    Prints them, and how many images each epoch leaves out. Raises UserError if the batch does not fit the data.
    """
    if not data.labelled:
        config = settle_unlabelled(config)
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
    _print_ramps(config.method, fit)
    left_out = images % fit.batch_size
    if left_out and fit.drop_last:
        print_once(
            f"each epoch leaves out {left_out} of {images} training images, others each time: the last batch is"
            " incomplete; --no-drop-last takes it in"
        )
    return dataclasses.replace(config, fit=fit)


def settle_unlabelled(config: ScriptConfig) -> ScriptConfig:
    """The configuration for data without labels, without the student alone. Raises UserError if it needs labels.

    Called before the data is read if --no-labels is given, and after it if no labels were found.
    """
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, no_labels=True))
    check_labels(config.method, config.job().role, labelled=False)
    if isinstance(config, TrainConfig):
        return config
    require(
        bool(config.teachers or config.cache.cache_from) or not config.method.needs_teacher,
        f"--data {config.data.source}: no labels to train a teacher by; name a trained one with --teacher",
    )
    require(
        not config.fine_tune_teacher,
        f"--fine-tune-teacher: trains a new last layer by labels, and {config.data.source} has none; leave it out",
    )
    if config.control:
        print_once("no labels: the student alone, which would be trained by them, is left out")
    return dataclasses.replace(config, control=False)


def check_labels(method: MethodFlags, role: str, labelled: bool) -> None:
    """Raise UserError if the data has no labels and the method needs them."""
    name = "a network alone" if role in ("teacher", "none") else role
    require(
        labelled or not method.uses_labels,
        f"{name} is trained by labels, and the data has none: distil a teacher by a method that needs none"
        f" ({methods_without_labels()})",
    )


def name_classes(config: DistillConfig, data: Data, shared: Sequence[str] = ()) -> Data:
    """The data with class names: its own, or without labels those of the (first) teacher, whose columns the student
    learns; `shared` are those of a shared cache.

    Raises UserError if the teacher has none.
    """
    if data.labelled or config.method.embeds or not (config.teachers or shared):
        return data
    name = config.cache.cache_from if shared else str(config.teachers[0])
    classes = shared or from_main(lambda: _classes_of(name, config))
    require(bool(classes), f"--teacher {name}: has no classes for a student to learn; name a teacher that has")
    print_once(f"classes: the {len(classes)} of {name}, as the images have no labels")
    return dataclasses.replace(data, classes=tuple(classes))


def _classes_of(name: str, config: DistillConfig) -> Sequence[str]:
    """The classes of a teacher, which may be on the main process's disk alone."""
    if is_pretrained(name):
        return load_pretrained(name, config.teacher_model, model_args=config.teacher_model_args).classes
    return read_model(local_folder(expand_user(name, "--teacher")))[0]["classes"]


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


def _print_ramps(method: MethodFlags, fit: FitConfig) -> None:
    """Say which of a method's weights do not reach their full size within the run."""
    for prefix, part in _parts(method).items():
        for name in ("ramp_epochs", "decay_epochs"):
            epochs = getattr(part, name, None)
            if isinstance(epochs, int | float) and epochs > fit.epochs:
                said = f"the run has {fit.epochs}, so that {method_name(part)} ends before its full strength"
                print_once(f"--{flag_of(name, prefix)} {epochs:g}: {said}")


def _parts(method: MethodFlags) -> dict[str, MethodFlags]:
    """A method's flags, or those of each of several, by what stands before their names."""
    return method.parts() if isinstance(method, CombinedFlags) else {"": method}


def flag_of(field: str, prefix: str = "") -> str:
    """A method's flag without its --; `prefix` stands before it if there are several methods."""
    return "-".join(filter(None, (prefix, *field.split("_"))))


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
    if not (config.fine_tune_teacher and from_main(lambda: is_pretrained(str(name)))):
        return None
    model, arguments = config.teacher_model, config.teacher_model_args
    pretrained = all_do(lambda: load_pretrained(str(name), model, model_args=arguments))
    job = config.head_job(pretrained.model, origin_of(pretrained, str(name)))
    job = dataclasses.replace(job, start=dataclasses.replace(job.start, model_args=pretrained.model_args))
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
    held = held_at_first(student, job)  # by the student's names, before its method wraps it
    distiller = Distiller(student, loss, compression)
    if distiller.student is not student:
        freeze_unused(distiller, data.size)
    left = set(distiller.student.parameters())  # a method may have taken layers away
    distiller.held = tuple(part for part in held if part in left)
    return distiller


def freeze_unused(distiller: Distiller, size: tuple[int, int]) -> None:
    """Freeze the deployed network's parameters that no loss sees, such as those behind the map that simkd takes.

    They would get no gradient, which DDP waits for.
    """
    network, training = distiller.student, distiller.student.training
    trained = [part for part in network.parameters() if part.requires_grad]
    network.eval()
    outputs = distiller.tap(torch.zeros(2, 3, *size, device=trained[0].device))
    seen = sum(part.sum() for part in (outputs.logits, *outputs.features.values()))
    for part, gradient in zip(trained, torch.autograd.grad(seen, trained, allow_unused=True), strict=True):
        part.requires_grad_(gradient is not None)
    network.train(training)


def probe_networks(job: Job, student: nn.Module, teacher: TeacherNetwork | None, data: Data) -> Pair:
    """What the job's method gets to know of its networks: their outputs for two grey images, and their layers' names.

    Neither network is changed. Raises: UserError for layers that do not exist or do not pair up.
    """
    layers, classes = loss_class(job.method).layers, len(data.classes)
    rows, labels = len(data.train.labels), data.train.labels if data.labelled else None
    student_stages = stages(job.model, student, classes)
    name = loss_class(job.method).partner(job.method, job.model)
    partner = _build_partner(name, job, data) if name else None
    if teacher is None:
        outputs = probe(student, data.size, "student", layers(job.method, student_stages, None)[0])
        kept = {"balance": job.fit.balance, "partner": partner, "labelled": data.labelled, "rows": rows}
        return Pair(outputs, None, labels, student_stages, **kept)
    if teacher.network is None:
        return _pair_of_shared(job, student, student_stages, teacher, data)._replace(partner=partner)
    teacher_stages = stages(teacher.summary["model"], teacher.network, 0 if job.method.embeds else teacher.classes)
    if teacher.members:  # the flags must name the teacher as well: networks.0.layer3
        teacher_stages = Stages(modules=teacher_stages.modules)
    names = layers(job.method, student_stages, teacher_stages)
    outputs = probe(student, data.size, "student", names[0]), probe(teacher.network, data.size, "teacher", names[1])
    classifier = teacher_stages.classifier
    head = teacher.network.get_submodule(classifier) if classifier else None
    return Pair(*outputs, labels, student_stages, teacher_stages, head, job.fit.balance, partner, data.labelled, rows)


def _pair_of_shared(job: Job, student: nn.Module, known: Stages, teacher: TeacherNetwork, data: Data) -> Pair:
    """The pair of a student, with `known` stages, and a teacher of which only logits are here.

    Raises UserError if the method needs more of the teacher.
    """
    try:
        layers, of_teacher = loss_class(job.method).layers(job.method, known, Stages(modules=("?",)))
    except UserError:  # the student's own layers are checked by now: it is the teacher's that are missing
        layers, of_teacher = (), ("its features",)
    alone, remedy = "logits", "take a method that compares logits, such as kd"
    if job.method.embeds:
        alone, remedy = "embeddings", "leave --patches out"
    require(
        not of_teacher,
        f"{job.role}: compares features of the teacher, and {teacher.shared.source} has its {alone} alone: give the"
        f" network (--teacher RUN) in its place, or {remedy}",
    )
    outputs = probe(student, data.size, "student", layers)
    answers = Outputs(torch.zeros(len(outputs.logits), teacher.classes))
    kept = {"balance": job.fit.balance, "labelled": data.labelled, "rows": len(data.train.labels)}
    labels = data.train.labels if data.labelled else None
    return Pair(outputs, answers, labels, known, width=teacher.shared.width, **kept)


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
    job.fit.check()  # again: its learning rate may have followed from the network or the data
    check_labels(job.method, job.role, data.labelled)
    require(
        not (job.views.mixes and loss.needs_hard_labels),
        f"{job.role} needs one label for each image: give --mixup 0 and --cutmix 0, or take another method",
    )
    if job.cache.cache_teacher and not job.method.needs_teacher and accelerator.is_main_process:
        print(f"{job.role} has no teacher: --cache-teacher does nothing", flush=True)
    if not job.cache.cache_teacher and job.cache != CacheConfig():
        print_once("--cache-dtype and --cache-top-k change nothing without --cache-teacher")
    if job.views.strong != ViewConfig().strong and not job.method.two_views:
        print_once(f"{job.role} sees one view of each image: the flags of the strong view change nothing")
    _check_method(job, loss, data)
    weighed = loss.has_cross_entropy and job.method.weighs_cross_entropy  # kd --alpha 1 has it, and multiplies it by 0
    lacks = f"{job.role}{' with these flags' * (loss.has_cross_entropy and data.labelled)}"
    lacks += f"{' without labels' * (not data.labelled)} has none"
    require(
        (weighed and data.labelled) or job.method.label_smoothing == 0,
        f"--label-smoothing {job.method.label_smoothing}: changes cross-entropy, and {lacks}; give 0",
    )
    require(
        weighed or job.fit.balance in ("none", "sampler"),
        f"--balance {job.fit.balance}: changes cross-entropy, and {lacks}; take --balance sampler",
    )
    check_network(network.module, job.fit, job.model, job.method.embeds)
    if is_module_function(job.model):
        check_one_image(network.module, job.model, data.size)
        if job.fit.channels_last:
            _check_channels_last(network.module, data.size, job.model)
    if job.fit.sync_batchnorm:
        check_batchnorm(network.module)
    if line := few_for_batchnorm(network.module, job.fit, accelerator.num_processes):
        print_once(line)
    layers, _ = loss.layers(job.method, stages(job.model, network.module, len(data.classes)), None)
    probe(network.module, data.size, "student", layers)
    if job.run.folder is not None:
        from_main(lambda: check_writable(job.run.folder, job.run.resume))


def _check_method(job: Job, loss: type[DistillationLoss], data: Data) -> None:
    """Raise UserError for a method that would learn nothing from so few classes, or images at a time."""
    parts, two = _parts(job.method).items(), len(data.classes) == 2
    alone = {name: part for name, part in parts if not isinstance(part, MLKDConfig)}  # it has other terms beside
    found = [flag_of("standardize", name) for name, part in alone.items() if getattr(part, "standardize", False)]
    flag = found[0] if found else ""
    require(
        not (two and flag),
        f"--{flag}: with two classes every standardised logit is 0.71 or -0.71, whatever the network says, so that"
        f" nothing is learnt from the teacher; give --no-{flag}",
    )
    together = job.fit.batch_size // job.fit.accumulate
    accumulated = f" in {job.fit.accumulate} parts" * (job.fit.accumulate > 1)
    require(
        not loss.compares_images or together >= 2,
        f"{job.role} compares images with each other, and --batch-size {job.fit.batch_size}{accumulated} is one at a"
        " time; give a larger --batch-size, or a smaller --accumulate",
    )
    if two and any(isinstance(part, DISTConfig) for _, part in parts):
        print_once("dist: with two classes an image's correlation is 1 or -1, so that only the term of --gamma teaches")


def _check_channels_last(network: nn.Module, size: tuple[int, int], name: str) -> None:
    """Raise UserError if a network of the user's own cannot take --channels-last, as .view on a map cannot."""
    try:
        laid_out = copy.deepcopy(network).to(memory_format=torch.channels_last)
    except Exception:  # not to be copied: the first step shows it
        return
    try:
        probe(laid_out, size, name)
    except (UserError, RuntimeError) as error:
        if "view size" not in str(error):
            raise
        raise UserError(
            f"{name}: uses .view on a map, which --channels-last lays out otherwise: write .reshape, or .flatten(1), in"
            " its place, or give --no-channels-last"
        ) from error


def few_for_batchnorm(network: nn.Module, fit: FitConfig, processes: int) -> str | None:
    """A warning if each process normalises over few images, as BatchNorm sees a batch's share alone."""
    share = fit.batch_size // processes // fit.accumulate
    alone = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    cut = processes > 1 or fit.accumulate > 1
    if not cut or share >= FEW_IMAGES or not alone or fit.sync_batchnorm:
        return None
    cuts = [f"{processes} processes"] * (processes > 1) + [f"--accumulate {fit.accumulate}"] * (fit.accumulate > 1)
    parts = " and ".join(cuts)
    return (
        f"warning: batch {fit.batch_size} over {parts} is {share} images each, and BatchNorm's statistics are of those"
        f" {share}, not of the batch: give a larger --batch-size (and --lr), fewer parts, or --sync-batchnorm (on"
        " GPUs)"
    )


def check_writable(out: Path, resume: bool = False) -> None:
    """Raises UserError if no run can be written to, or resumed in, the folder `out`; leaves nothing behind."""
    try:
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        check_folder(out, resume)
        if there != out:
            tempfile.TemporaryDirectory(dir=there).cleanup()
        require(there != out or os.access(out, os.W_OK | os.X_OK), f"cannot write to {out}; choose another --out")
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error}); choose another --out") from error
