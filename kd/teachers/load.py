"""Loading teachers: run folders, Hub ids, pretrained networks and files of weights, adapted to the student's data.

A teacher of embeddings is the same network without its classifier: its answers are embeddings, with classes unmatched.
"""

import difflib
import hashlib
import math
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from kd.config import METHODS, DistillConfig, is_named
from kd.config.presets import usual_teacher
from kd.data import Data
from kd.errors import UserError, require
from kd.losses.deit import TwoHeads
from kd.models import build_model, is_module_function, without_classifier
from kd.models.adapt import Renormalize, resize_input
from kd.models.pretrained import (
    NEW_HEAD_ADVICE,
    Pretrained,
    at_size,
    build_embedder,
    build_pretrained,
    check_embedder,
    check_pretrained,
    is_of_library,
    is_pretrained,
    load_pretrained,
)
from kd.runs.load import load_network
from kd.runs.nodes import is_elsewhere, share_run
from kd.runs.results import read_model
from kd.runs.taught_by import embedder_identity, joint_identity, teacher_identity
from kd.teachers.live import TeacherLogits
from kd.utils.console import print_once
from kd.utils.hub import local_folder
from kd.utils.processes import all_do, from_main
from kd.utils.system import expand_user


class SharedLogits(NamedTuple):
    """A teacher's logits from elsewhere, without its network (kd/teachers/shared.py)."""

    source: str  # hub:USER/NAME@COMMIT, or cache:FOLDER
    sha256: str  # of the logits and of what they depend on
    width: int | None  # of what enters the teacher's classifier
    open: Callable[[Accelerator], TeacherLogits]  # fetches and checks them; all processes call it together

    @property
    def record(self) -> dict[str, str]:
        """For config.json and summary.json."""
        return {"source": self.source, "sha256": self.sha256}


class TeacherNetwork(NamedTuple):
    """A teacher's network, ready for use: on the device, in eval mode, without gradients."""

    network: nn.Module | None  # None: only its logits are here, in `shared`
    folder: Path  # or the name of a pretrained network
    sha256: str  # of its weights and of the inputs it expects
    summary: dict
    classes: int  # of its own classifier, before they are matched with the data's; of embeddings, their width
    members: tuple["TeacherNetwork", ...] = ()  # of several teachers
    shared: SharedLogits | None = None
    flags: dict = {}  # noqa: RUF012  those that --teacher needs beside it to have this teacher again; never mutated

    @property
    def names(self) -> list[str]:
        """Folder or name of the teacher, or of each of several."""
        return [self.shared.source] if self.shared else [str(member.folder) for member in self.members or (self,)]

    @property
    def folders(self) -> list[str]:
        """What --teacher takes to have this teacher again; empty if only its logits are here."""
        return [] if self.shared else self.names


class Ensemble(nn.Module):
    """Several networks as one: the logarithm of their mean probabilities, which are logits again.

    Probabilities are averaged at temperature 1; a method's temperature softens the mean afterwards.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        each = torch.stack([network(image).float().log_softmax(dim=1) for network in self.networks])
        return each.logsumexp(dim=0) - math.log(len(self.networks))


class Joined(nn.Module):
    """Several embedders as one: their embeddings, each normalised to length 1, side by side."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return torch.cat([F.normalize(network(image).float(), dim=1) for network in self.networks], dim=1)


def check_teachers(config: DistillConfig) -> None:
    """Raises UserError for a teacher that is missing or does not fit its flags, before any data is read."""
    embeds = config.method.embeds
    require(
        not config.fine_tune_teacher or any(map(is_pretrained, config.teachers)),
        f"--fine-tune-teacher: {', '.join(config.teachers)} is a run, whose last layer is trained already; leave the"
        " flag out, or name a pretrained network or a file of weights",
    )
    files = [name for name in config.teachers if is_pretrained(name) and not is_of_library(name)]
    built = [name for name in config.teachers if embeds and is_of_library(name)]  # at a size of one's own
    require(
        config.teacher_model_args is None or bool(files or built),
        f"--teacher-model-args {config.teacher_model_args}: is for a file of weights or the recipe's own teacher;"
        f" {' '.join(config.teachers)} says itself how it is built",
    )
    if not files and config.teacher_model != usual_teacher(config.preset):
        named = " ".join(config.teachers)
        print_once(f"--teacher-model {config.teacher_model} changes nothing: {named} says itself what it is")
    for name in config.teachers:
        if not is_of_library(name) and is_elsewhere(expand_user(name, "--teacher")):
            continue  # the main process checks it
        if is_pretrained(name):
            model, arguments = config.teacher_model, config.teacher_model_args
            if embeds:
                check_embedder(name, model, arguments)
            else:
                check_pretrained(name, model, config.fine_tune_teacher, model_args=arguments)
            continue
        if embeds and is_module_function(name):
            continue
        method = [name] if is_named(name) else difflib.get_close_matches(name, METHODS, n=1)
        require(
            not method or expand_user(name, "--teacher").exists(),
            f"--teacher {name}: no such run folder; did you mean the method {method and method[0]}? A method follows"
            " the teachers: --teacher RUN METHOD",
        )
        read_model(local_folder(expand_user(name, "--teacher")))


def load_teachers(
    names: Sequence[str | Path],
    data: Data,
    device: torch.device,
    trust_code: bool,
    model: str = "",
    model_args: str | None = None,
) -> TeacherNetwork:
    """The one teacher named, or the average of several; files of weights are for the network `model`, whose constructor
    is given `model_args`.

    Raises UserError as load_teacher and kd.models.pretrained do.
    """
    pretrained = from_main(lambda: [is_pretrained(str(name)) for name in names])
    load = lambda name: all_do(lambda: load_pretrained(name, model, model_args=model_args))  # noqa: E731
    members = tuple(
        _load_pretrained_teacher(load(str(name)), str(name), data, device)
        if is_network
        else load_teacher(name, data, device, trust_code)
        for name, is_network in zip(names, pretrained, strict=True)
    )
    return members[0] if len(members) == 1 else _joint(members, Ensemble, len(data.classes))


def load_embedders(
    names: Sequence[str | Path],
    data: Data,
    device: torch.device,
    trust_code: bool,
    model: str = "",
    model_args: str | None = None,
) -> TeacherNetwork:
    """The teacher named, without its classifier; of several the embeddings, each normalised, side by side.

    Takes what load_teachers takes, and a module:function whose network brings its own weights. Raises UserError as
    that does, and for a network whose embedding is unknown.
    """
    members = [_load_embedder(str(name), data, device, trust_code, (model, model_args)) for name in names]
    if len(members) == 1:
        return members[0]
    widths = [member.classes for member in members]
    print_once(f"{len(members)} teachers: their embeddings, each normalised to length 1, side by side: {sum(widths)}")
    return _joint(tuple(members), Joined, sum(widths))


def _load_embedder(
    name: str, data: Data, device: torch.device, trust_code: bool, of_file: tuple[str, str | None]
) -> TeacherNetwork:
    """One teacher of embeddings; `of_file`: the network of a file of weights, and the arguments of its constructor or
    of a library's network's."""
    folder = Path(name)
    if from_main(lambda: is_pretrained(name)):
        pretrained = all_do(lambda: load_pretrained(name, of_file[0], model_args=of_file[1]))
        if is_of_library(name):
            pretrained = at_size(pretrained, of_file[1])
        network, info = build_embedder(pretrained, name), pretrained._asdict()
        sha256, summary = pretrained.sha256, {"model": pretrained.model}
    elif is_module_function(name):
        network, info, sha256, summary = all_do(lambda: _own_embedder(name, data, trust_code))
    else:
        folder, here = share_run(name)
        network, info, sha256, summary = load_network(here, trust_code)
        network = network.student if isinstance(network, TwoHeads) else network  # both heads take its embedding
        if info["num_classes"]:
            without_classifier(network, info["model"], info["num_classes"])
    adapt_input(network, info, data, device)
    with torch.no_grad():
        width = network(torch.zeros(2, 3, *data.size, device=device)).shape[1]
    return TeacherNetwork(network, folder, embedder_identity(sha256, info), summary, width)


def _own_embedder(name: str, data: Data, trust_code: bool) -> tuple[nn.Module, dict, str, dict]:
    """The network of a module:function with the weights that it brings; it sees the images as the student does."""
    require(trust_code, f"--teacher {name}: building it runs its author's code; --trust-code says that you trust it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for what it does not load from somewhere
        network = build_model(name, 0, data.size)
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return network, {"image_size": data.size, "mean": data.mean, "std": data.std}, digest.hexdigest(), {"model": name}


def _joint(members: tuple[TeacherNetwork, ...], kind: type[nn.Module], classes: int) -> TeacherNetwork:
    """Several teachers as one network of `kind`."""
    network = kind([member.network for member in members]).eval()
    sha256 = joint_identity([member.sha256 for member in members])
    name = Path(" + ".join(str(member.folder) for member in members))
    model = " + ".join(member.summary["model"] for member in members)
    return TeacherNetwork(network, name, sha256, {"model": model}, classes, members)


def load_teacher(name: str | Path, data: Data, device: torch.device, trust_code: bool) -> TeacherNetwork:
    """A finished run, by its folder or Hub id, as teacher for students on `data`.

    It sees images with its own normalisation and size; its classes are matched by name. Raises: UserError if it lacks a
    class of `data`, or its network is a `module:function` and not trusted.
    """
    folder, here = share_run(name)
    network, info, sha256, summary = load_network(here, trust_code)
    match_to_data(network, info, data, device, f"teacher {folder}", "train one on this data")
    return TeacherNetwork(network, folder, teacher_identity(sha256, info), summary, len(info["classes"]))


def _load_pretrained_teacher(pretrained: Pretrained, name: str, data: Data, device: torch.device) -> TeacherNetwork:
    network = build_pretrained(pretrained, name)
    match_to_data(network, pretrained._asdict(), data, device, f"--teacher {name}", NEW_HEAD_ADVICE)
    summary = {"model": pretrained.model}
    return TeacherNetwork(network, Path(name), pretrained.sha256, summary, len(pretrained.classes))


def match_classes(teacher: tuple[str, ...], data: tuple[str, ...]) -> list[int] | None:
    """For each class of the data, the teacher's column of that name; None if one is missing or ambiguous.

    Names match if they are equal, or differ only in case, Unicode form, '_' for a space, or what follows a comma (of
    synonyms the first counts). Two lists of a thousand names that agree in nine of ten places are both ImageNet's,
    which is spelt in many ways.
    """
    for spelling in (lambda name: name, _simplified):
        columns = [spelling(name) for name in teacher]
        wanted = [spelling(name) for name in data]
        if all(columns.count(name) == 1 for name in wanted) and len(set(wanted)) == len(wanted):
            return [columns.index(name) for name in wanted]
    agree = sum(_simplified(one) == _simplified(other) for one, other in zip(teacher, data, strict=False))
    return list(range(len(data))) if len(data) == len(teacher) == 1000 and agree >= 900 else None


def _simplified(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).split(",")[0].replace("_", " ").casefold().split())


def match_to_data(network: nn.Module, info: dict, data: Data, device: torch.device, who: str, remedy: str) -> None:
    """Freeze the network and adapt its input and classes to `data`, by hooks, so that its layers keep their names.

    `info` is what it expects: mean, std, image_size, classes. Raises UserError, with `who` and `remedy`, if it lacks a
    class.
    """
    classes = tuple(info["classes"])
    require(
        bool(classes),
        f"{who}: is an embedder, without classes; take the method embed, or train a classifier from it (--init)",
    )
    columns = match_classes(classes, data.classes)
    if columns is None:
        missing = [name for name in data.classes if name not in classes]
        lacks = f"not {', '.join(map(repr, missing[:3]))} of" if missing else "some of these names twice; of"
        raise UserError(f"{who} knows {len(classes)} classes and {lacks} the data's {len(data.classes)}: {remedy}")
    matched = tuple(classes[column] for column in columns)
    if matched != classes or matched != data.classes:
        numbers = all(name.isdecimal() for name in data.classes)
        shown = ", ".join(data.classes[:5]) + (", ..." if len(data.classes) > 5 else "")
        print_once(
            f"{who}: its {len(classes)} classes are matched by name with the data's {len(data.classes)} ({shown})"
            + ("; they are bare numbers, which need not mean the same" if numbers else "")
        )
    adapt_input(network, info, data, device)
    if columns != list(range(len(classes))):  # the data's classes may be a part of the teacher's, or in another order
        chosen = torch.tensor(columns, device=device)
        network.register_forward_hook(lambda _, images, logits: logits[:, chosen])


def adapt_input(network: nn.Module, info: dict, data: Data, device: torch.device) -> None:
    """Freeze the network, on the device, and let it take the images of `data` at its own size and normalisation."""
    if (tuple(info["mean"]), tuple(info["std"])) != (data.mean, data.std):
        renormalize = Renormalize((data.mean, data.std), (info["mean"], info["std"])).to(device).forward
        network.register_forward_pre_hook(lambda _, images: renormalize(*images))
    if tuple(info["image_size"]) != tuple(data.size):
        resize_input(network, tuple(info["image_size"]))
    network.eval().requires_grad_(False).to(device)
