"""What model.json must hold before a network is built from it: the file may be anybody's."""

from collections.abc import Callable
from pathlib import Path

from kd.errors import require
from kd.files import is_number

LARGEST = 4096  # pixels of an image's side: more would fill the memory before anything is known to be wrong


def check_info(path: Path, info: dict) -> None:
    """Raises UserError where model.json does not hold what a run writes: it may be anybody's."""
    missing = {"model", "num_classes", "image_size", "mean", "std", "classes"} - set(info)
    require(not missing, f"{path} lacks {', '.join(sorted(missing))}")
    sound = {
        "model": isinstance(info["model"], str),
        "classes": _list_of(info["classes"], lambda name: isinstance(name, str)),
        "num_classes": isinstance(info["classes"], list) and info["num_classes"] == len(info["classes"]) > 0,
        "image_size": _list_of(info["image_size"], _is_size, 2),
        "mean": _list_of(info["mean"], is_number, 3),
        "std": _list_of(info["std"], lambda std: is_number(std) and std > 0, 3),
        "stored_size": _is_size(info.get("stored_size") or LARGEST),
        "resized": _list_of(info.get("resized") or [1, 1], _is_size, 2),
    }
    if sound["image_size"] and sound["stored_size"] and info.get("stored_size"):
        sound["stored_size"] = info["stored_size"] >= max(info["image_size"])
    wrong = [name for name, fine in sound.items() if not fine]
    require(not wrong, f"{path} has {', '.join(wrong)} that no run writes")


def _list_of(value: object, sound: Callable[[object], bool], length: int | None = None) -> bool:
    return isinstance(value, list) and len(value) == (length or len(value)) and all(map(sound, value))


def _is_size(side: object) -> bool:
    return type(side) is int and 0 < side <= LARGEST
