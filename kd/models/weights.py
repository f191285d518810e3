"""Files of weights as people have them: read without running anything, and fitted to a network.

A file may hold more than weights (an epoch, an optimizer, the training's flags), and its names may differ from the
network's: by what wrapped the network when it was saved (`module.`, `model.`, ...), or wholly, as those of the
literature's own code do. In that case its tensors are taken in order, if every shape agrees.
"""

import pickle
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kd.errors import UserError, require
from kd.utils.console import clip
from kd.utils.files import COUNTER, differences, read_json, read_weights, same_shape, without_prefixes

SUFFIXES = (".pth", ".pt", ".th", ".tar", ".bin", ".ckpt", ".safetensors")

WEIGHTS = ("state_dict", "model_state_dict", "model", "net", "module")
"""Keys under which checkpoints store the weights."""
AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "ema_model")
"""Keys of weights averaged over the training, which are taken if there are no other weights."""

WRAPPERS = ("module", "model", "_orig_mod", "backbone", "student", "teacher", "net", "network", "timm_model")
"""What stands before the names if the network was saved inside something else."""

MEAN = "running_mean"
KINDS = ("weight", "bias", MEAN, "running_var")  # last parts of names that mean the same everywhere

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape of a network's tensors; -1 is any size."""


class StandIn:
    """Stands for an object beside the weights: its class is not imported, nothing of it is called or kept."""

    def __new__(cls, *args: object) -> "StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


# Classes that training scripts save beside the weights. Their instances become stand-ins; any other class is refused.
_NUMPY = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_PATHS = [f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")]
_TIMES = [f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta")]
BESIDE = ("argparse.Namespace", "types.SimpleNamespace", "numpy.dtype", "numpy.ndarray", *_NUMPY, *_PATHS, *_TIMES)


class Weights(NamedTuple):
    """The tensors of a file."""

    tensors: dict[str, Tensor]
    ordered: bool = True  # whether they stand in the order of the network's layers
    notes: tuple[str, ...] = ()  # what was chosen and left out, for the user


class Fit(NamedTuple):
    """How a file's tensors become a network's."""

    names: dict[str, str]  # of the network's tensors -> of the file's
    notes: tuple[str, ...] = ()


def read_file(path: Path) -> Weights:
    """The weights in a file. Raises UserError if there are none, several, or what would have to be run."""
    with open(path, "rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs")
    require(not pointer, f"{path}: is a Git LFS pointer and holds no weights; fetch the file itself with git lfs pull")
    if path.suffix == ".safetensors":
        return Weights(read_weights(path), ordered=False)
    return choose(_unpickle(path), path)


def read_folder(folder: Path) -> Weights:
    """The weights in a folder that Transformers or timm saved, in one file or in several with an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_file(folder / name)
    for index in sorted(folder.glob("*.index.json")):
        files = read_json(index).get("weight_map")
        inside = lambda file: isinstance(file, str) and Path(file).name == file  # noqa: E731
        require(
            isinstance(files, dict) and all(map(inside, files.values())),
            f"{index}: has no weight_map of tensors to files; download the folder again",
        )
        parts = sorted(set(files.values()))
        lost = [part for part in parts if not (folder / part).is_file()]
        require(not lost, f"{folder}: lacks {', '.join(lost[:3])} of {index.name}; download the whole folder")
        tensors = [read_file(folder / part).tensors for part in parts]
        return Weights({name: value for part in tensors for name, value in part.items()}, ordered=False)
    raise UserError(f"{folder}: holds no model.safetensors and no pytorch_model.bin; download the whole folder")


def _unpickle(path: Path) -> object:
    """What torch.save wrote, with stand-ins for what is no tensor and no plain container."""
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in BESIDE]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    classes = _refused_classes(path, error)
    if classes:
        return (
            f"{path}: contains more than tensors, which is never executed ({', '.join(classes[:2])}); save its"
            " state_dict() alone, best as safetensors"
        )
    if tarfile.is_tarfile(path) or (zipfile.is_zipfile(path) and "PytorchStreamReader" in str(error)):
        return f"{path}: is an archive of other files, not a file of weights; unpack it and name the file inside"
    size = path.stat().st_size
    return (
        f"{path}: cannot be read as weights; it has {size} bytes and is damaged, incomplete or of another format"
        f" ({clip(f'{type(error).__name__}: {error}', 120)}); give what torch.save or safetensors wrote"
    )


def _refused_classes(path: Path, error: Exception) -> list[str]:
    """The classes in a pickle that only running it could restore."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of files before torch 1.6, which have no list
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = [named[1]] if named and isinstance(error, pickle.UnpicklingError) else []
    return sorted(set(found) - set(BESIDE))


def choose(content: object, path: Path) -> Weights:
    """The state dict among what a checkpoint holds. Raises UserError if there is none, or no clear choice."""
    notes = []
    while (key := _key_of_weights(content, path)) is not None:
        others = [other for other in content if other != key and _holds_weights(content[other])]
        if others or key not in (*WEIGHTS, *AVERAGED):
            rest = f", left out {', '.join(map(repr, others))}" if others else ""
            notes.append(f"{path}: took the weights under {key!r}{rest}")
        content = content[key]
    tensors = _named_tensors(content)
    require(
        bool(tensors),
        f"{path}: contains no state dict (names and tensors), neither plain nor under {', '.join(map(repr, WEIGHTS))};"
        " save its state_dict() alone",
    )
    weights = [key for key in content if _holds_weights(content[key])]
    if weights:
        notes.append(f"{path}: left out the weights under {', '.join(map(repr, weights))}")
    left_out = [str(key) for key in content if key not in tensors and key not in weights]
    if left_out:
        notes.append(f"{path}: left out {_examples(left_out)} beside the weights: no tensors")
    return Weights(without_prefixes(tensors, path), True, tuple(notes))


def _key_of_weights(content: object, path: Path) -> str | None:
    """The key of `content` under which the weights are; None if they are `content` itself, or there are none."""
    if not isinstance(content, Mapping):
        return None
    found = [key for key in content if _holds_weights(content[key])]
    known = [key for key in found if key in WEIGHTS]
    plain = [] if any(map(_is_weight, _named_tensors(content).values())) else found
    candidates = known or [key for key in plain if key not in AVERAGED] or plain
    require(
        len(candidates) < 2,
        f"{path}: has weights under {', '.join(map(repr, candidates))}, and no name says which; save the"
        " state_dict() of one alone",
    )
    return candidates[0] if candidates else None


def _holds_weights(value: object) -> bool:
    inside = [value[key] for key in (*WEIGHTS, *AVERAGED) if key in value] if isinstance(value, Mapping) else []
    return bool(_named_tensors(value)) or any(map(_holds_weights, inside))


def _is_weight(tensor: Tensor) -> bool:
    """Not so a counter, a best accuracy or the state of a random generator."""
    return tensor.is_floating_point() and tensor.ndim > 0


def _named_tensors(value: object) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {key: part for key, part in value.items() if isinstance(part, Tensor) and isinstance(key, str)}


def find_fit(weights: Weights, shapes: Shapes) -> Fit | None:
    """How the file's tensors fit a network of these shapes: by name, else in order. None if they do not.

    Raises UserError if several parts of the file fit.
    """
    parts = _parts(weights.tensors)
    fits = {prefix: names for prefix, part in parts.items() if (names := _by_name(part, weights.tensors, shapes))}
    how = ()
    if not fits and weights.ordered:
        same = {frozenset(part.values()): prefix for prefix, part in parts.items()}  # of equal parts the shortest names
        in_order = {prefix: _by_order(parts[prefix], weights.tensors, shapes) for prefix in same.values()}
        fits = {prefix: names for prefix, names in in_order.items() if names}
        how = _order_note(next(iter(fits.values()))) if fits else ()
    if not fits:
        return None
    require(
        len(fits) == 1,
        f"the weights under {', '.join(repr(prefix) for prefix in fits)} all fit; save the state_dict() of one alone",
    )
    prefix, names = next(iter(fits.items()))
    others = [name for name in weights.tensors if name not in parts[prefix].values()]
    left_out = (f"took the weights under {prefix!r}, left out {_examples(others)}",) if others else ()
    return Fit(names, how + left_out)


def _order_note(names: dict[str, str]) -> tuple[str, ...]:
    matched = {ours: theirs for ours, theirs in names.items() if not ours.endswith(COUNTER)}
    ours, theirs = next(((one, other) for one, other in matched.items() if one != other), ("", ""))
    return (f"matched {len(matched)} tensors by order and shape, their names differ ({theirs} is {ours})",)


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Wrappers before the names -> the names below them, and what those are in the file.

    If all names have a wrapper, the part without it has the same tensors, and only the shortest names count.
    """
    prefixes = {""}
    for name in tensors:
        words = name.split(".")
        for depth, word in enumerate(words[:-1], 1):
            if word not in WRAPPERS:
                break
            prefixes.add(".".join(words[:depth]) + ".")
    parts = {}
    for prefix in sorted(sorted(prefixes), key=len):
        parts[prefix] = {name[len(prefix) :]: name for name in tensors if name.startswith(prefix)}
    return parts


def _by_name(part: Mapping[str, str], tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, str] | None:
    """The part's names by the network's, if both have the same; BatchNorm's counters may be missing in either."""
    if _without_counters(part) != _without_counters(shapes):
        return None
    names = {name: part[name] for name in shapes if name in part}
    return names if _same_shapes(names, tensors, shapes) else None


def _by_order(part: Mapping[str, str], tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, str] | None:
    """The part's names by the network's in the same place, if everything that can be compared agrees.

    The number of tensors, every shape, and the last part of every name (a weight is no bias); a name that both have
    must stand in the same place; and names that differ in numbers only must count upwards.
    """
    theirs = [name for name in part if not name.endswith(COUNTER)]
    ours = [name for name in shapes if not name.endswith(COUNTER)]
    if len(ours) != len(theirs) or not _counts_upwards(theirs):
        return None
    places = {name: place for place, name in enumerate(theirs)}
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        kinds = {name.rpartition(".")[2] for name in (one, other)}
        if (len(kinds) > 1 and kinds & set(KINDS)) or places.get(one, place) != place:
            return None
    names = {one: part[other] for one, other in zip(ours, theirs, strict=True)}
    means = {one: other for one, other in names.items() if one.endswith(MEAN)}
    counters = {one.removesuffix(MEAN) + COUNTER: other.removesuffix(MEAN) + COUNTER for one, other in means.items()}
    names |= {one: other for one, other in counters.items() if one in shapes and other in tensors}
    return names if _same_shapes(names, tensors, shapes) else None


def _counts_upwards(names: Iterable[str]) -> bool:
    """Whether names that differ in their numbers only stand in the order of these numbers."""
    last: dict[str, list[int]] = {}
    for name in names:
        pattern, numbers = re.sub(r"\d+", "#", name), [int(number) for number in re.findall(r"\d+", name)]
        if numbers and last.get(pattern, numbers) > numbers:
            return False
        last[pattern] = numbers
    return True


def _without_counters(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.endswith(COUNTER)}


def _same_shapes(names: Mapping[str, str], tensors: Mapping[str, Tensor], shapes: Shapes) -> bool:
    return all(same_shape(tuple(tensors[other].shape), shapes[name]) for name, other in names.items())


def misfit(weights: Weights, shapes: Shapes) -> str:
    """In what the file's tensors differ from the network's, seen from the part of the file that is nearest to it."""
    nearest = max(_parts(weights.tensors).values(), key=lambda part: len(part.keys() & shapes.keys()))
    given = {name: tuple(weights.tensors[other].shape) for name, other in nearest.items()}
    text = differences(given, shapes)
    if not weights.ordered and len(_without_counters(given)) == len(_without_counters(shapes)):
        text += "; a safetensors file keeps no order to match them by: save the weights with torch.save"
    return text


def rows_of_head(weights: Weights) -> int | None:
    """The number of outputs of the last linear layer in the file, if it has one; a guess unless they are ordered."""
    return next((len(value) for value in reversed(weights.tensors.values()) if value.ndim == 2), None)


def _examples(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(clip(name, 80) for name in names[:2])}{', ...' if len(names) > 2 else ''})"
