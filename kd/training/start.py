"""What a network starts from (--init), and which of its weights stay as they are (--freeze).

--init takes a run, or weights from elsewhere (kd/models/pretrained.py). Weights from elsewhere keep the normalisation
that they were trained with, and so does a run that itself started from such; any other run's network sees the data
normalised by the data's own mean and standard deviation, as a new network does.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from kd.compress.prune import resize
from kd.config import DistillConfig, Job, Origin
from kd.config.model_args import asked_size
from kd.data import Data
from kd.errors import UserError, require
from kd.models import LIBRARIES, build_model, check_name, classifier_layers, head_layers
from kd.models.pretrained import (
    Flags,
    Pretrained,
    check_pretrained,
    fits,
    is_of_library,
    is_pretrained,
    load_into,
    load_pretrained,
)
from kd.models.weights import Weights, rows_of_head
from kd.runs.held_out import check_held_out
from kd.runs.nodes import is_elsewhere, share_run
from kd.runs.results import checked_weights_sha256, read_model
from kd.teachers.load import check_teachers, match_classes
from kd.utils.console import print_once
from kd.utils.files import read_tensors
from kd.utils.processes import all_do, from_main
from kd.utils.system import expand_user

PUBLISHED = "pretrained"  # as --init: the weights that the library publishes for the job's own network

TEACHER_START = Flags("--teacher-init", "--teacher-model")

RUN_NEEDED = "needs a finished run of the same network on the same classes"


class Start(NamedTuple):
    """The weights that --init names."""

    weights: Pretrained
    sha256: str
    run: dict | None = None  # model.json, if they are a run's

    @property
    def normalised(self) -> bool:
        """Whether they expect a normalisation of their own, whatever the data's."""
        return self.run is None or bool(self.run.get("resized"))


def flags_of(job: Job) -> Flags:
    return Flags("--init", "--model" if job.role == "teacher" else "--student")


def check_start(job: Job, flags: Flags | None = None) -> None:
    """Raise UserError if --init does not fit the job, as far as that shows without data and without fetching weights.

    `flags`: what the user calls --init and the network.
    """
    flags, name = flags or flags_of(job), job.compress.init
    if name is None:
        return
    if name == PUBLISHED and Path(PUBLISHED).is_dir():
        print_once(f"{flags.weights} {PUBLISHED}: the published weights, not the folder, which ./{PUBLISHED} names")
    name = _named(job, flags)
    if not is_of_library(name) and is_elsewhere(expand_user(name, flags.weights)):
        return  # the main process checks it
    if not is_pretrained(name):
        _read_run(name, job, flags)
        return
    for flag in ("prune", "sparsity"):
        asked = getattr(job.compress, flag) > 0
        require(not asked, f"--{flag}: {RUN_NEEDED}, and {flags.weights} {name} is none")
    if is_of_library(name):
        check_pretrained(name, job.model, flags=flags)
        return
    weights = load_pretrained(name, job.model, flags, job.start.model_args)
    size, rows = asked_size(job.model, job.model_args) or weights.image_size, rows_of_head(Weights(weights.weights))
    with torch.random.fork_rng(devices=[]):
        network = build_model(job.model, rows or 10, size, quiet=True, arguments=job.model_args)
        load_into(network, weights, name, head_layers(job.model, network, rows or 10), resample=True)


def check_networks(config: DistillConfig) -> None:
    """Raises UserError for a network that does not exist or does not fit its flags, before any data is read."""
    check_name(config.student)
    check_start(config.job())
    if not config.method.needs_teacher or config.cache.cache_from:
        return
    if config.teachers:
        check_teachers(config)
    else:
        check_name(config.teacher_model)
        check_start(config.teacher_job(), TEACHER_START)


def start_from(job: Job, data: Data, flags: Flags | None = None) -> tuple[Job, Data]:
    """The job with what its --init is and the size it takes images at; the data normalised as the weights expect.

    Both are unchanged without --init, and for a run's weights that see the data as any network does. Prints what was
    decided. Raises UserError if the weights cannot be had.
    """
    flags, name = flags or flags_of(job), job.compress.init
    if name is None:
        return job, data
    start = open_start(job, flags)
    if start.run:
        check_held_out(str(expand_user(name, flags.weights)), f"{flags.weights} {name}", job.data, data, begins=True)
    size = _choose_size(start, job, data)
    if not start.normalised and size == tuple(data.size):
        return job, data
    mean, std = (start.weights.mean, start.weights.std) if start.normalised else (data.mean, data.std)
    notes = [f"at {size[1]} x {size[0]} pixels" + ("" if size == tuple(data.size) else ", resized inside")]
    if start.normalised:
        numbers = ("/".join(f"{value:.3g}" for value in part) for part in (mean, std))
        notes.append("normalised as they expect (mean {}, std {})".format(*numbers))
    seen = start.weights.image_size
    if size == tuple(data.size) != seen and asked_size(job.model, job.model_args) is None:
        notes.append(f"trained at {seen[1]} x {seen[0]} (--image-size {seen[0]} resizes the data)")
    print_once(f"{flags.weights} {name}: its weights see images {'; '.join(notes)}")
    origin = Origin(name, start.sha256, size, tuple(mean), tuple(std))
    return dataclasses.replace(job, origin=origin), dataclasses.replace(data, mean=tuple(mean), std=tuple(std))


def open_start(job: Job, flags: Flags) -> Start:
    """The weights that the job's --init names, read or fetched."""
    name = _named(job, flags)
    if not from_main(lambda: is_pretrained(name)):
        return _read_run(name, job, flags)
    weights = all_do(lambda: load_pretrained(name, job.model, flags, job.start.model_args))
    return Start(weights._replace(model=job.model), weights.sha256)


def _named(job: Job, flags: Flags) -> str:
    """--init, with the name of the network itself for `pretrained`."""
    name = job.compress.init
    if name != PUBLISHED:
        return name
    library = job.model.partition("/")[0] in LIBRARIES and "/" in job.model
    require(
        library,
        f"{flags.weights} {PUBLISHED}: nobody publishes weights of {job.model}; give {flags.model} torchvision/NAME or"
        " timm/NAME, or name a file or a run",
    )
    check_name(job.model)
    return job.model


def _read_run(name: str, job: Job, flags: Flags) -> Start:
    """A finished run's weights. Raises UserError if there is no such run, or it is of another network."""
    asked, (_, folder) = f"{flags.weights} {name}", share_run(expand_user(name, flags.weights))
    require(folder.is_dir(), f"{asked}: no such run folder; name where that run lies now")
    info, summary = read_model(folder)
    model = info["model"]
    require(model == job.model, f"{asked}: is a {model}, not a {job.model}; name a run of the same model")
    deployed = info.get("deployed") or {}
    require(not deployed, f"{asked}: {deployed.get('method')} added to its network; name another run")
    sha256 = checked_weights_sha256(folder, summary)
    sparsity = _sparsity(info, folder)
    require(
        job.compress.sparsity >= sparsity,
        f"{asked}: has a sparsity of {sparsity}, which training would fill again; add --sparsity {sparsity}",
    )
    size = tuple(info.get("resized") or info["image_size"])
    expected = tuple(info["classes"]), size, tuple(info["mean"]), tuple(info["std"])
    weights = Pretrained(model, read_tensors(folder / "model.safetensors"), *expected, ordered=False)
    return Start(weights._replace(flags=flags, model_args=info.get("model_args")), sha256, info)


def _sparsity(info: dict, folder: Path) -> float:
    recipe = info.get("compression") or {}
    try:
        return float(recipe.get("sparsity", 0.0))
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'model.json'}: compression {recipe} cannot be rebuilt ({error!r})") from error


def _choose_size(start: Start, job: Job, data: Data) -> tuple[int, int]:
    """The size at which the network takes images: --model-args', else the data's if the weights fit a network for
    that, else the weights' own."""
    own, ours = start.weights.image_size, tuple(data.size)
    if size := asked_size(job.model, job.model_args):
        return size
    if own == ours or (start.run and start.run.get("resized")):
        return own
    if start.run and (start.run.get("compression") or {}).get("shapes"):  # pruned: convolutions take any size
        return ours
    classes = len(data.classes)
    try:
        network = build_model(job.model, classes, ours, quiet=True, arguments=job.model_args)
        return ours if fits(network, start.weights, _heads(network, job, ours, classes)) else own
    except Exception:  # a network of the user's own raises anything for images of another size
        return own


def _heads(network: nn.Module, job: Job, image_size: tuple[int, int], classes: int) -> tuple[str, ...]:
    """The layers over the classes; of an embedder those that it lacks, and that --init's weights may have."""
    if classes == 0:
        return classifier_layers(job.model, image_size, job.model_args)
    return head_layers(job.model, network, classes)


def load_start(network: nn.Module, job: Job, data: Data) -> None:
    """Load --init's weights into the job's network, and for a pruned run its shapes.

    A last layer of the same classes in the same order is kept; else it stays as it was built, and a line says so. An
    embedder has none, and leaves that of the weights out.
    Raises UserError if the weights do not fit.
    """
    flags, name = flags_of(job), job.compress.init
    start = open_start(job, flags)
    known, classes = start.weights.classes, len(data.classes)
    same = bool(known) and match_classes(known, data.classes) == list(range(len(known)))
    heads = () if same else _new_heads(network, job, data, f"{flags.weights} {name}", bool(known))
    if start.run:
        _resize_as(network, start.run, heads, classes, name)
    try:
        notes = load_into(network, start.weights, name, heads, resample=True)
    except UserError as error:
        built, ours = start.weights.model_args if start.run else None, job.start.model_args
        if built == ours or not (built or ours):
            raise
        theirs = f"; it was built with --model-args {built}" if built else ""
        raise UserError(f"{error}{theirs}" + (f"; the network now with {ours}" if ours else "")) from error
    for note in (*start.weights.notes, *notes):
        print_once(f"{flags.weights} {name}: {note}")
    if heads:
        _print_heads(heads, start.weights, classes, f"{flags.weights} {name}", job.role)


def _new_heads(network: nn.Module, job: Job, data: Data, asked: str, knows: bool) -> tuple[str, ...]:
    """The layers that stay as they are built. Raises UserError if there is none, or for a job that needs the weights'.

    `asked`: the flag and its value; `knows`: whether its weights know any classes.
    """
    for flag in ("prune", "sparsity"):
        wanted = getattr(job.compress, flag) > 0
        require(not wanted, f"--{flag}: {RUN_NEEDED}, and {asked} {'knows others' if knows else 'has none'}")
    heads = _heads(network, job, job.resized or data.size, len(data.classes))
    has_head = not data.classes or bool(heads)
    require(has_head, f"{asked}: {job.model} ends in no linear layer to put in place")
    return heads


def _print_heads(heads: tuple[str, ...], weights: Pretrained, classes: int, asked: str, role: str) -> None:
    """Say what became of the last layer; `asked`: the flag and its value."""
    theirs = any(key.startswith(f"{head}.") for key in weights.weights for head in heads)
    others = f"in place of the {len(weights.classes)} that its weights know"
    if not weights.classes:
        others = "in place of its weights' own, which have no names" if theirs else "its weights have none"
    if classes:
        print_once(f"{asked}: a new last layer {', '.join(heads)} for {classes} classes, {others}")
    elif theirs:
        print_once(f"{asked}: its last layer {', '.join(heads)} is left out; {role} trains none")


def _resize_as(network: nn.Module, info: dict, heads: tuple[str, ...], classes: int, name: str) -> None:
    """Give the network a pruned run's shapes, but a new last layer the data's number of classes."""
    recipe = info.get("compression") or {}
    try:
        shapes = {key: list(values) for key, values in recipe.get("shapes", {}).items()}
        if classes == 0:
            shapes = {key: values for key, values in shapes.items() if key not in heads}
        fresh = {head: network.get_submodule(head) for head in heads if head in shapes}
        for head in fresh:
            shapes[head][1] = classes
        resize(network, shapes)
        for head in fresh.values():  # resizing leaves zeros
            head.reset_parameters()
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise UserError(f"{name}: its compression {recipe} cannot be rebuilt ({error!r})") from error


def freeze(network: nn.Module, job: Job) -> None:
    """Freeze the layers of --freeze for good, unless --freeze-epochs ends it; prints how much that is.

    Raises UserError for a layer that does not exist, or if nothing is left to train.
    """
    if not job.start.freeze:
        return
    chosen = _named_parameters(network, job)
    total, frozen = (sum(part.numel() for part in parts) for parts in (network.parameters(), chosen))
    fixed = set(chosen)
    others = [part for part in network.parameters() if part not in fixed]
    require(
        any(part.requires_grad for part in others),
        f"--freeze {' '.join(job.start.freeze)}: leaves nothing of {job.model} to train; name fewer layers",
    )
    epochs = job.start.freeze_epochs
    until = f" for the first {epochs} epoch{'s' * (epochs > 1)}" if epochs else ""
    until += ", which is the whole run" if epochs and epochs >= job.fit.epochs else ""
    print_once(f"--freeze: {frozen:,} of {total:,} parameters stay as they are{until}")
    if not epochs:
        for parameter in chosen:
            parameter.requires_grad_(False)


def held_at_first(network: nn.Module, job: Job) -> tuple[nn.Parameter, ...]:
    """The parameters that --freeze-epochs leaves as they are in the first epochs."""
    chosen = _named_parameters(network, job) if job.start.freeze_epochs else ()
    return tuple(part for part in chosen if part.requires_grad)  # what its author froze stays frozen


def _named_parameters(network: nn.Module, job: Job) -> tuple[nn.Parameter, ...]:
    """The parameters that --freeze names by themselves, or by a module that they are in."""
    named = dict(network.named_parameters())
    chosen = {}
    for layer in job.start.freeze:
        inside = {name: part for name, part in named.items() if name == layer or name.startswith(f"{layer}.")}
        if not inside:
            modules = [name for name, _ in network.named_modules() if name]
            require(layer not in modules, f"--freeze {layer}: has no weights; name another layer")
            close = difflib.get_close_matches(layer, [*modules, *named], n=3, cutoff=0.5)
            outermost = dict.fromkeys(name.partition(".")[0] for name in named)
            help_ = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(outermost)}"
            raise UserError(f"--freeze {layer}: {job.model} has no such layer; {help_}")
        chosen |= inside
    return tuple(chosen.values())
