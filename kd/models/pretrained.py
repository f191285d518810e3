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

from kd.config import Origin
from kd.errors import UserError, require
from kd.models import LIBRARIES, build_model, check_name, libraries
from kd.utils.files import not_finite, read_json, read_weights, without_prefixes

NEW_HEAD_ADVICE = "--fine-tune-teacher trains a last layer for them"


RESCALES_INSIDE = ("googlenet", "inception_v3")  # rescale their images inside when pretrained, and only then


class Pretrained(NamedTuple):
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


def is_pretrained(name: str) -> bool:
    """Whether --teacher names no run: torchvision/NAME, timm/NAME, or a file of weights."""
    library, _, short = name.partition("/")
    pretrained = library in LIBRARIES and bool(short) and not Path(name).is_dir()
    return pretrained or Path(name).suffix in (*PICKLED, ".safetensors")


def load_pretrained(name: str, model: str) -> Pretrained:
    """Fetch or open it; `model` says what network the weights of a file are for.

    Raises: UserError where it cannot be fetched or read, or does not say what it expects.
    """
    library, _, short = name.partition("/")
    if library not in LIBRARIES or Path(name).is_file():
        path = expand_user(name)
        expects = expectations(path)
        return Pretrained(model, read_tensors(path), *expects)
    check_pretrained(name, model)
    return {"torchvision": _from_torchvision, "timm": _from_timm}[library](name, short)


def check_pretrained(name: str, model: str) -> None:
    """Raises UserError where it cannot be what `read` wants, as far as is known without fetching or reading weights."""
    library, _, short = name.partition("/")
    if library not in LIBRARIES or Path(name).is_file():
        expectations(expand_user(name))
        check_name(model)
        return
    check_name(name)
    rescales = library == "torchvision" and short in RESCALES_INSIDE
    require(not rescales, f"--teacher {name}: rescales its images inside; take timm/{short}, which does not")


def build_pretrained(foreign: Pretrained, name: str) -> nn.Module:
    """The network as it is, with its own classes."""
    require(
        bool(foreign.classes),
        f"--teacher {name}: its classes have no names to match with the data's; {NEW_HEAD_ADVICE}",
    )
    network = build_model(foreign.model, len(foreign.classes), foreign.image_size)
    load_into(network, foreign.weights, name, foreign.model)
    return network


def origin_of(foreign: Pretrained, name: str) -> Origin:
    return Origin(name, foreign.sha256, foreign.image_size, foreign.mean, foreign.std)


def load_into(network: nn.Module, weights: dict[str, Tensor], name: str, model: str) -> None:
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


def _from_torchvision(name: str, short: str) -> Pretrained:
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
    return Pretrained(name, tensors, tuple(weights.meta["categories"]), size, tuple(expects.mean), tuple(expects.std))


def _from_timm(name: str, short: str) -> Pretrained:
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
    return Pretrained(name, network.state_dict(), tuple(classes), size, tuple(expects["mean"]), tuple(expects["std"]))


def _unreachable(name: str, error: Exception, also: str) -> str:
    why = " ".join(f"{type(error).__name__}: {error}".split())[:150]
    return (
        f"--teacher {name}: its pretrained weights could not be had ({why}); check the network, {also}, or name a"
        " file of weights (--teacher FILE --teacher-model NAME)"
    )


#: (kd.foreign_file) Files of weights from elsewhere, and what the file beside them says that they expect. Nothing is unpickled.


PICKLED = (".pth", ".pt")


NESTED = ("state_dict", "model_state_dict", "model")  # under which other people's checkpoints keep the weights


EXPECTED_JSON = (
    '{"image_size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "classes": [...]}'
)


class Expected(NamedTuple):
    """What weights expect, as kd.foreign.Foreign has it."""

    classes: tuple[str, ...]  # none where nobody says
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def expand_user(name: str) -> Path:
    """`name` with its ~ resolved. Raises UserError for a user that is not there."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"--teacher {name}: no such file or folder ({error})") from error


def expectations(path: Path) -> Expected:
    """What FILE.json beside a file of weights says. Raises UserError where it says too little, or of another scale."""
    require(path.is_file(), f"--teacher {path}: no such file")
    beside = path.with_suffix(".json")
    require(
        beside.is_file(),
        f"--teacher {path}: weights alone do not say what they expect; write {beside}: {EXPECTED_JSON}",
    )
    info = read_json(beside)
    whole = f"{beside} is of a run, which is more than its weights: name the run folder, --teacher {path.parent}"
    require("model" not in info, whole)
    try:
        size = tuple(map(int, info["image_size"]))
        mean, std = (tuple(map(float, info[key])) for key in ("mean", "std"))
        classes = tuple(map(str, info.get("classes", ())))
        sound = len(size) == 2 and len(mean) == len(std) == 3 and min(size) > 0
    except (KeyError, TypeError, ValueError):
        sound = False
    require(sound, f"{beside}: wanted is {EXPECTED_JSON}")
    shares = all(0 <= part <= 1 for part in mean) and all(0 < part <= 1 for part in std)
    require(shares, f"{beside}: mean and std are shares of 255, from 0 to 1; wanted is {EXPECTED_JSON}")
    return Expected(classes, size, mean, std)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises UserError where it holds anything else."""
    return _unpickled(path) if path.suffix in PICKLED else read_weights(path)


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that torch.save wrote."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path}: holds more than tensors, which is not executed here, or cannot be read"
            f" ({' '.join(str(error).split())[:120]}); save its state_dict() alone, best as safetensors"
        ) from error
    for key in NESTED:
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    tensors = isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values())
    require(tensors and bool(found), f"{path}: holds no state dict (names and tensors), plain or under {NESTED[0]!r}")
    return without_prefixes(dict(found), path)
