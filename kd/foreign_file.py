"""Files of weights from elsewhere, and what the file beside them says that they expect. Nothing is unpickled."""

import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kd.errors import UserError, require
from kd.files import read_json, read_weights, without_prefixes

PICKLED = (".pth", ".pt")
NESTED = ("state_dict", "model_state_dict", "model")  # under which other people's checkpoints keep the weights

BESIDE = '{"image_size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "classes": [...]}'


class Expected(NamedTuple):
    """What weights expect, as kd.foreign.Foreign has it."""

    classes: tuple[str, ...]  # none where nobody says
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def expanded(name: str) -> Path:
    """`name` with its ~ resolved. Raises UserError for a user that is not there."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"--teacher {name}: no such file or folder ({error})") from error


def expectations(path: Path) -> Expected:
    """What FILE.json beside a file of weights says. Raises UserError where it says too little, or of another scale."""
    require(path.is_file(), f"--teacher {path}: no such file")
    beside = path.with_suffix(".json")
    require(beside.is_file(), f"--teacher {path}: weights alone do not say what they expect; write {beside}: {BESIDE}")
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
    require(sound, f"{beside}: wanted is {BESIDE}")
    shares = all(0 <= part <= 1 for part in mean) and all(0 < part <= 1 for part in std)
    require(shares, f"{beside}: mean and std are shares of 255, from 0 to 1; wanted is {BESIDE}")
    return Expected(classes, size, mean, std)


def weights_in(path: Path) -> dict[str, Tensor]:
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
