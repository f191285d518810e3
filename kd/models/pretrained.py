"""Networks trained elsewhere: pretrained ones of torchvision and timm, and files of weights.

A file of weights needs FILE.json beside it: the image size and normalisation that its network expects, and its classes.
Nothing is unpickled: .pth files are read with weights_only, which allows tensors and plain containers.
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

from kd.config import Origin
from kd.errors import UserError, require
from kd.models import LIBRARIES, build_model, check_name, libraries
from kd.utils.console import one_line
from kd.utils.files import not_finite, read_json, read_weights, without_prefixes

NEW_HEAD_ADVICE = "--fine-tune-teacher trains a new last layer for them"

PICKLED = (".pth", ".pt")
NESTED = ("state_dict", "model_state_dict", "model")  # keys under which other people's checkpoints store the weights
RESCALES_IMAGES = ("googlenet", "inception_v3")  # inside the network, if pretrained
EXPECTED_JSON = (
    '{"image_size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "classes": [...]}'
)


class Expected(NamedTuple):
    """What a network expects of its images, and the names of its classes."""

    classes: tuple[str, ...]  # empty if unknown
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Pretrained(NamedTuple):
    """A network trained elsewhere, with what it expects."""

    model: str  # a name for build_model
    weights: dict[str, Tensor]
    classes: tuple[str, ...]  # empty if unknown
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def sha256(self) -> str:
        """Of everything that its logits depend on: model, weights and expectations."""
        digest = hashlib.sha256(json.dumps([self.model, *self[2:]]).encode())
        for name in sorted(self.weights):
            digest.update(name.encode())
            digest.update(self.weights[name].contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def is_pretrained(name: str) -> bool:
    """Whether --teacher names no run: torchvision/NAME, timm/NAME, or a file of weights."""
    library, _, short = name.partition("/")
    of_library = library in LIBRARIES and bool(short) and not Path(name).is_dir()
    return of_library or Path(name).suffix in (*PICKLED, ".safetensors")


def check_pretrained(name: str, model: str) -> None:
    """Raise UserError if load_pretrained would, as far as that shows without fetching or reading weights."""
    library, _, short = name.partition("/")
    if library not in LIBRARIES or Path(name).is_file():
        read_expected(expand_user(name))
        check_name(model)
        return
    check_name(name)
    rescales = library == "torchvision" and short in RESCALES_IMAGES
    require(not rescales, f"--teacher {name}: rescales its images internally; use timm/{short}, which does not")


def load_pretrained(name: str, model: str) -> Pretrained:
    """Fetch or open `name`; `model` is the network of a file of weights.

    Raises: UserError if it cannot be fetched or read, or if its expectations are unknown.
    """
    library, _, short = name.partition("/")
    if library not in LIBRARIES or Path(name).is_file():
        path = expand_user(name)
        expected = read_expected(path)
        return Pretrained(model, read_tensors(path), *expected)
    check_pretrained(name, model)
    return {"torchvision": _from_torchvision, "timm": _from_timm}[library](name, short)


def build_pretrained(pretrained: Pretrained, name: str) -> nn.Module:
    """The network with its weights and all of its own classes."""
    require(
        bool(pretrained.classes),
        f"--teacher {name}: its classes have no names to match with the data's; {NEW_HEAD_ADVICE}",
    )
    network = build_model(pretrained.model, len(pretrained.classes), pretrained.image_size)
    load_into(network, pretrained.weights, name, pretrained.model)
    return network


def load_into(network: nn.Module, weights: dict[str, Tensor], name: str, model: str) -> None:
    """Load the weights of --teacher `name` into a `model`. Raises UserError if they do not fit or are not finite."""
    bad = not_finite(weights)
    require(bad is None, f"--teacher {name}: {bad} holds NaN or infinity; use intact weights")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        remedy = "" if model == name else "; name the right one with --teacher-model"
        raise UserError(
            f"--teacher {name}: its weights do not fit the network {model}{remedy}: {lines[:300]}"
        ) from error


def origin_of(pretrained: Pretrained, name: str) -> Origin:
    return Origin(name, pretrained.sha256, pretrained.image_size, pretrained.mean, pretrained.std)


def _from_torchvision(name: str, short: str) -> Pretrained:
    import torchvision

    weights = torchvision.models.get_model_weights(short).DEFAULT
    transforms = weights.transforms()
    try:
        tensors = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise UserError(_unreachable(name, error, f"save {weights.url} as {place}")) from error
    # DenseNets' files have the layer names that torchvision used before 2018.
    tensors = {re.sub(r"(layer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key): value for key, value in tensors.items()}
    classes, size = tuple(weights.meta["categories"]), (transforms.crop_size[0],) * 2
    return Pretrained(name, tensors, classes, size, tuple(transforms.mean), tuple(transforms.std))


def _from_timm(name: str, short: str) -> Pretrained:
    timm = libraries.timm_library()
    try:
        network = timm.create_model(short, pretrained=True)
    except Exception as error:  # of the Hub's client, a missing file, a network without pretrained weights
        raise UserError(_unreachable(name, error, "name one of timm.list_pretrained()")) from error
    config = timm.data.resolve_model_data_config(network)
    subset, classes = timm.data.infer_imagenet_subset(network), network.pretrained_cfg.get("label_names") or ()
    if not classes and subset:
        classes = timm.data.ImageNetInfo(subset).label_descriptions()
    size = tuple(config["input_size"][1:])
    return Pretrained(name, network.state_dict(), tuple(classes), size, tuple(config["mean"]), tuple(config["std"]))


def _unreachable(name: str, error: Exception, remedy: str) -> str:
    reason = one_line(error, 150)
    return (
        f"--teacher {name}: cannot fetch its pretrained weights ({reason}); check the network, {remedy}, or name a file"
        " of weights (--teacher FILE --teacher-model NAME)"
    )


def expand_user(name: str) -> Path:
    """`name` with ~ expanded. Raises UserError if that user does not exist."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"--teacher {name}: no such file or folder ({error})") from error


def read_expected(path: Path) -> Expected:
    """Read FILE.json beside a file of weights. Raises UserError if it is missing, malformed or of another scale."""
    require(path.is_file(), f"--teacher {path}: no such file")
    beside = path.with_suffix(".json")
    require(
        beside.is_file(),
        f"--teacher {path}: its image size and normalisation are unknown; write {beside}: {EXPECTED_JSON}",
    )
    info = read_json(beside)
    require("model" not in info, f"{beside}: belongs to a run; name the run's folder, --teacher {path.parent}")
    try:
        size = tuple(map(int, info["image_size"]))
        mean, std = (tuple(map(float, info[key])) for key in ("mean", "std"))
        classes = tuple(map(str, info.get("classes", ())))
        valid = len(size) == 2 and len(mean) == len(std) == 3 and min(size) > 0
    except (KeyError, TypeError, ValueError):
        valid = False
    require(valid, f"{beside}: incomplete or malformed; write {EXPECTED_JSON}")
    in_range = all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)
    require(in_range, f"{beside}: mean and std must be from 0 to 1, as shares of 255; write {EXPECTED_JSON}")
    return Expected(classes, size, mean, std)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of weights. Raises UserError if it contains anything else."""
    return _read_pickled(path) if path.suffix in PICKLED else read_weights(path)


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """The state dict in a file that torch.save wrote."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path}: contains more than tensors, which is never executed, or cannot be read"
            f" ({one_line(error, 120)}); save its state_dict() alone, best as safetensors"
        ) from error
    for key in NESTED:
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    tensors = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
    require(
        tensors and bool(content),
        f"{path}: contains no state dict (names and tensors), neither plain nor under {NESTED[0]!r}; save its"
        " state_dict() alone",
    )
    return without_prefixes(dict(content), path)
