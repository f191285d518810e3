"""Trying things before anything expensive starts."""

import dataclasses
import tempfile
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from kd.compress import compress, sizes
from kd.compress.prune import resize
from kd.config import DistillConfig, Job
from kd.data import Data
from kd.data.loader import check_batch
from kd.errors import UserError, require
from kd.losses import LOSSES
from kd.models import build_model, probe, stages
from kd.models.adapt import resized
from kd.models.pretrained import (
    _load,
    is_foreign,
    origin_of,
    read,
)
from kd.runs.results import read_model
from kd.teachers.load import Frozen
from kd.types import Pair, Stages
from kd.utils.files import load_weights


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
    network, _ = start_network(job, data)
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


def head_task(config: DistillConfig, name: str | Path, data: Data) -> tuple[Job, Data] | None:
    """What trains a new last layer upon a teacher from elsewhere: the job, and the data normalised as that one expects.

    None where that is not asked, or for a run, which has learned its last layer.
    """
    if not (config.fine_tune_teacher and is_foreign(str(name))):
        return None
    found = read(str(name), config.teacher_model)
    job = config.head_job(found.model, origin_of(found, str(name)))
    return job, dataclasses.replace(data, mean=found.mean, std=found.std)


def start_network(job: Job, data: Data) -> tuple[nn.Module, dict]:
    """The job's network as its training begins, and its compression's recipe for model.json (empty if there is none).

    Fresh, from --init's weights, or from elsewhere and fresh in its last layer alone; then compressed.
    """
    if job.origin is None:
        network = build_model(job.model, len(data.classes), data.size)
    else:
        network = with_fresh_head(job, len(data.classes))
        resized(network, job.origin.image_size, data)
    fresh_sizes = sizes(network)
    if job.compress.init is not None:
        _start_from(network, Path(job.compress.init), job, data)
    return network, compress(network, job, data.size, len(data.classes), fresh_sizes)


def _start_from(network: nn.Module, folder: Path, job: Job, data: Data) -> None:
    """Load a finished run's weights; of a pruned one also its shapes."""
    require(folder.is_dir(), f"--init {folder}: no such run folder; name where that run lies now")
    info, _ = read_model(folder)
    model, recipe = info["model"], info.get("compression") or {}
    require(model == job.model, f"--init {folder}: is a {model}, here is a {job.model}; name a run of the same model")
    deployed = info.get("deployed") or {}
    require(not deployed, f"--init {folder}: {deployed.get('method')} added to its network; name another run")
    ours = (list(data.classes), list(data.size))
    require(
        (info["classes"], list(info["image_size"])) == ours,
        f"--init {folder}: was trained on {len(info['classes'])} classes in images of {info['image_size']},"
        f" here are {len(ours[0])} in {ours[1]}, or others; name a run on the same data",
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
    """The job's network with its origin's weights, all of it frozen but a new last linear layer over `classes`."""
    origin = job.origin
    foreign = read(origin.source, job.model)
    network = build_model(foreign.model, classes, foreign.image_size)
    head = stages(foreign.model, network, classes).classifier
    require(head is not None, f"--fine-tune-teacher: {foreign.model} ends in no linear layer to put in place")
    fresh = {key: value for key, value in network.state_dict().items() if key.startswith(f"{head}.")}
    kept = {key: value for key, value in foreign.weights.items() if not key.startswith(f"{head}.")}
    _load(network, kept | fresh, origin.source, foreign.model)
    network.requires_grad_(False).get_submodule(head).requires_grad_(True)
    return network
