"""Networks that this project did not train: pretrained ones of torchvision and timm, and state dicts in files.

Nothing is unpickled: a .pth file is read with weights_only, which knows tensors and plain containers alone.
"""

import hashlib
import json
import pickle
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd.config import Job, Origin
from kd.errors import UserError, require
from kd.files import not_finite
from kd.foreign_file import PICKLED, expanded, expectations, weights_in
from kd.models import LIBRARIES, build_model, check_name, libraries, stages

NEW_HEAD = "--fine-tune-teacher trains a last layer for them"
WITHOUT = ("googlenet", "inception_v3")  # rescale their images inside when pretrained, and only then


class Foreign(NamedTuple):
    """A network from elsewhere, as it expects to be used."""

    model: str  # as build_model takes it
    weights: dict[str, Tensor]
    classes: tuple[str, ...]  # none where nobody says
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def sha256(self) -> str:
        """Of weights and expectations: what its answers follow from."""
        digest = hashlib.sha256(json.dumps([self.model, *self[2:]]).encode())
        for name in sorted(self.weights):
            digest.update(name.encode())
            digest.update(self.weights[name].contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def is_foreign(name: str) -> bool:
    """Whether --teacher names no run: torchvision/NAME, timm/NAME, or a file of weights."""
    library, _, short = name.partition("/")
    pretrained = library in LIBRARIES and bool(short) and not Path(name).is_dir()
    return pretrained or Path(name).suffix in (*PICKLED, ".safetensors")


def read(name: str, model: str) -> Foreign:
    """Fetch or open it; `model` says what network the weights of a file are for.

    Raises: UserError where it cannot be fetched or read, or does not say what it expects.
    """
    library, _, short = name.partition("/")
    if library not in LIBRARIES or Path(name).is_file():
        path = expanded(name)
        expects = expectations(path)
        return Foreign(model, weights_in(path), *expects)
    check(name, model)
    return {"torchvision": _from_torchvision, "timm": _from_timm}[library](name, short)


def check(name: str, model: str) -> None:
    """Raises UserError where it cannot be what `read` wants, as far as is known without fetching or reading weights."""
    library, _, short = name.partition("/")
    if library not in LIBRARIES or Path(name).is_file():
        expectations(expanded(name))
        check_name(model)
        return
    check_name(name)
    rescales = library == "torchvision" and short in WITHOUT
    require(not rescales, f"--teacher {name}: rescales its images inside; take timm/{short}, which does not")


def build(foreign: Foreign, name: str) -> nn.Module:
    """The network as it is, with its own classes."""
    require(bool(foreign.classes), f"--teacher {name}: its classes have no names to match with the data's; {NEW_HEAD}")
    network = build_model(foreign.model, len(foreign.classes), foreign.image_size)
    _load(network, foreign.weights, name, foreign.model)
    return network


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


def origin_of(foreign: Foreign, name: str) -> Origin:
    return Origin(name, foreign.sha256, foreign.image_size, foreign.mean, foreign.std)


def _load(network: nn.Module, weights: dict[str, Tensor], name: str, model: str) -> None:
    bad = not_finite(weights)
    require(bad is None, f"--teacher {name}: {bad} holds NaN or infinity; no network was ever scored with that")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        remedy = "" if model == name else "; name their own with --teacher-model"
        raise UserError(
            f"--teacher {name}: its weights do not fit the network {model}{remedy}: {lines[:300]}"
        ) from error


def _from_torchvision(name: str, short: str) -> Foreign:
    import torchvision

    weights = torchvision.models.get_model_weights(short).DEFAULT
    expects = weights.transforms()
    try:
        tensors = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise UserError(_unreachable(name, error, f"put {weights.url} there as {place}")) from error
    # DenseNets' files name their layers as torchvision did before 2018.
    tensors = {re.sub(r"(layer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key): value for key, value in tensors.items()}
    size = (expects.crop_size[0],) * 2
    return Foreign(name, tensors, tuple(weights.meta["categories"]), size, tuple(expects.mean), tuple(expects.std))


def _from_timm(name: str, short: str) -> Foreign:
    timm = libraries.timm_library()
    try:
        network = timm.create_model(short, pretrained=True)
    except Exception as error:  # the Hub's client, a missing file, a network that has no pretrained weights
        raise UserError(_unreachable(name, error, "name one of timm.list_pretrained()")) from error
    expects = timm.data.resolve_model_data_config(network)
    subset, classes = timm.data.infer_imagenet_subset(network), network.pretrained_cfg.get("label_names") or ()
    if not classes and subset:
        classes = timm.data.ImageNetInfo(subset).label_descriptions()
    size = tuple(expects["input_size"][1:])
    return Foreign(name, network.state_dict(), tuple(classes), size, tuple(expects["mean"]), tuple(expects["std"]))


def _unreachable(name: str, error: Exception, also: str) -> str:
    why = " ".join(f"{type(error).__name__}: {error}".split())[:150]
    return (
        f"--teacher {name}: its pretrained weights could not be had ({why}); check the network, {also}, or name a"
        " file of weights (--teacher FILE --teacher-model NAME)"
    )


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
