"""Teachers: anything that answers a Batch with Outputs. The training loop cannot tell one from another."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kd.config import DistillConfig
from kd.data import Data
from kd.errors import UserError, require
from kd.models.adapt import Renormalize, resize_input
from kd.models.pretrained import (
    NEW_HEAD_ADVICE,
    build_pretrained,
    check_pretrained,
    expand_user,
    is_pretrained,
    load_pretrained,
)
from kd.runs.load import load_network
from kd.runs.results import read_model
from kd.utils.hub import local_folder


class TeacherNetwork(NamedTuple):
    """A teacher's network, ready to be asked: on the device, in eval mode, without gradients."""

    network: nn.Module
    folder: Path  # or the name of a network from elsewhere
    sha256: str  # of its weights and of what it expects
    summary: dict
    classes: int  # of its own classifier, before they are matched with the data's
    members: tuple["TeacherNetwork", ...] = ()  # of several teachers


class Average(nn.Module):
    """Several networks as one: the logarithm of their mean probabilities, which are logits again.

    The mean is that of the probabilities as they are; a method's temperature softens it afterwards.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        each = torch.stack([network(image).float().log_softmax(dim=1) for network in self.networks])
        return each.logsumexp(dim=0) - math.log(len(self.networks))


def check_teachers(config: DistillConfig) -> None:
    """Raises UserError for a teacher that is not there, or cannot be what its flags say: before any data is read."""
    require(
        not config.fine_tune_teacher or any(map(is_pretrained, config.teachers)),
        f"--fine-tune-teacher: {', '.join(config.teachers)} is a run, which has learned its last layer; leave the flag"
        " out, or name a teacher from elsewhere",
    )
    for name in config.teachers:
        if is_pretrained(name):
            check_pretrained(name, config.teacher_model)
        else:
            read_model(local_folder(expand_user(name)))


def load_teachers(
    names: Sequence[str | Path], data: Data, device: torch.device, trust_code: bool, model: str = ""
) -> TeacherNetwork:
    """The one teacher named, or the average of several; `model` is the network of those that are files of weights.

    Raises UserError as load_teacher and kd.foreign do.
    """
    load = lambda name: (  # noqa: E731
        _load_foreign(str(name), model, data, device)
        if is_pretrained(str(name))
        else load_teacher(local_folder(name), data, device, trust_code)
    )
    members = tuple(load(name) for name in names)
    if len(members) == 1:
        return members[0]
    network = Average([member.network for member in members]).eval()
    sha256 = hashlib.sha256("".join(member.sha256 for member in members).encode()).hexdigest()
    name = Path(" + ".join(str(member.folder) for member in members))
    model = " + ".join(member.summary["model"] for member in members)
    return TeacherNetwork(network, name, sha256, {"model": model}, len(data.classes), members)


def load_teacher(folder: Path, data: Data, device: torch.device, trust_code: bool) -> TeacherNetwork:
    """A finished run as teacher for students on `data`.

    Its normalisation and image size are kept, its classes are matched by name. Raises: UserError where it lacks a class
    of `data`, or its network is a `module:function` and not trusted.
    """
    network, info, sha256, summary = load_network(folder, trust_code)
    match_to_data(network, info, data, device, f"teacher {folder}", "train one on this data")
    # What it says follows from its normalisation and classes as well.
    identity = hashlib.sha256(f"{sha256} {json.dumps(info, sort_keys=True)}".encode()).hexdigest()
    return TeacherNetwork(network, folder, identity, summary, len(info["classes"]))


def _load_foreign(name: str, model: str, data: Data, device: torch.device) -> TeacherNetwork:
    found = load_pretrained(name, model)
    network = build_pretrained(found, name)
    match_to_data(network, found._asdict(), data, device, f"--teacher {name}", NEW_HEAD_ADVICE)
    return TeacherNetwork(network, Path(name), found.sha256, {"model": found.model}, len(found.classes))


def match_classes(theirs: tuple[str, ...], ours: tuple[str, ...]) -> list[int] | None:
    """For each of our classes the place of theirs with its name; None where that cannot be told.

    The same name, or one that differs only in case, '_' for a space, or what follows a comma: of synonyms the first
    counts. Two lists of a thousand that agree in nine of ten places are both ImageNet's, whose other names are spelt in
    many ways.
    """
    for same in (lambda name: name, _plain):
        named = [same(name) for name in theirs]
        if all(named.count(same(name)) == 1 for name in ours) and len({same(name) for name in ours}) == len(ours):
            return [named.index(same(name)) for name in ours]
    agree = sum(_plain(one) == _plain(other) for one, other in zip(theirs, ours, strict=False))
    return list(range(len(ours))) if len(ours) == len(theirs) == 1000 and agree >= 900 else None


def _plain(name: str) -> str:
    return " ".join(name.split(",")[0].replace("_", " ").casefold().split())


def match_to_data(network: nn.Module, info: dict, data: Data, device: torch.device, who: str, remedy: str) -> None:
    """Freeze it and make it answer for `data`, by hooks, so that its layers keep their names.

    `info` is what it expects: mean, std, image_size, classes. Raises UserError, which says `who` it is and what the
    `remedy` is, where it lacks a class.
    """
    theirs, ours = tuple(info["classes"]), data.classes
    columns = match_classes(theirs, ours)
    if columns is None:
        missing = [name for name in ours if name not in theirs]
        lacks = f"not {', '.join(map(repr, missing[:3]))} of" if missing else "some of these names twice; of"
        raise UserError(f"{who} knows {len(theirs)} classes and {lacks} the data's {len(ours)}: {remedy}")
    if (tuple(info["mean"]), tuple(info["std"])) != (data.mean, data.std):
        renormalize = Renormalize((data.mean, data.std), (info["mean"], info["std"])).to(device)
        network.register_forward_pre_hook(lambda _, images: renormalize(*images))
    if tuple(info["image_size"]) != tuple(data.size):
        resize_input(network, tuple(info["image_size"]))
    if columns != list(range(len(theirs))):  # by name: ours may come in another order, or be some of theirs
        chosen = torch.tensor(columns, device=device)
        network.register_forward_hook(lambda _, images, logits: logits[:, chosen])
    network.eval().requires_grad_(False).to(device)
