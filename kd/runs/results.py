"""Run folders as they lie on the disk: finished runs, and whatever else was found instead of one."""

import glob
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from kd.errors import UserError, require
from kd.metrics import top_k
from kd.runs import checkpoint
from kd.utils.files import is_number, read_json, read_json_lines, read_weights, sha256_file

RUN_FILES = ("config.json", "summary.json", "model.json", "checkpoint")  # any of them makes a folder a run's


TEXT, NUMBER = (str,), (int, float)


# What the report reads of a summary: the kind, and whether null is allowed (no validation split, or --no-test).
KEYS = {
    "script": (TEXT, False),
    "method": (TEXT, False),
    "model": (TEXT, False),
    "params": (NUMBER, False),
    "seed": (NUMBER, False),
    "epochs": (NUMBER, False),
    **dict.fromkeys(("val_top1_last", "val_top1_best", "best_epoch"), (NUMBER, True)),
    **dict.fromkeys(("test_top1", "test_top5", "test_nll", "test_ece", "test_images"), (NUMBER, True)),
    **dict.fromkeys(("test_top1_best", "agreement", "teacher_test_top1"), (NUMBER, True)),
    # Only of a run whose training classes differ in size (kd/shots.py).
    **dict.fromkeys(("test_balanced_top1", "test_top1_many", "test_top1_medium", "test_top1_few"), (NUMBER, True)),
}


PERCENT = [key for key in KEYS if "top" in key or key in ("test_ece", "agreement")]


TESTED = ("test_top1", "test_top5", "test_nll", "test_ece", "test_images")  # all of them, or none


class Other(NamedTuple):
    """Something that was asked for and is no finished run."""

    path: str
    state: str
    why: str


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    summary: dict
    identity: dict
    method_flags: dict
    source: str  # --data as it was given

    @property
    def seed(self) -> int:
        return self.summary["seed"]

    @property
    def role(self) -> str:
        return self.identity["role"]

    @property
    def tested(self) -> bool:
        return self.summary["test_top1"] is not None


def collect_runs(patterns: list[str]) -> tuple[list[Run], list[Other]]:
    """Every run that the folders or globs name, those in folders of runs included; nothing is left out silently."""
    runs, others, seen = {}, [], set()
    for pattern in patterns:
        paths = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not paths:
            others.append(Other(pattern, "missing", "no such folder, and no folder matches"))
        for path in paths:
            for folder, state in _search(path):
                if folder.resolve() in seen:
                    continue
                seen.add(folder.resolve())
                try:
                    run = _read(folder) if state is None else Other(str(folder), "no run", state)
                except UserError as error:
                    run = Other(str(folder), "broken", str(error))
                if isinstance(run, Run):
                    twin = runs.setdefault(json.dumps(run.identity, sort_keys=True), run)
                    if twin is not run:
                        others.append(Other(str(folder), "a copy", f"the same run as {twin.path}; counted once"))
                else:
                    others.append(run)
    return list(runs.values()), others


def _search(path: Path) -> list[tuple[Path, str | None]]:
    """Run folders at or below `path`, with None; what is none, with the reason. A tree without runs is one entry."""
    if not path.is_dir():
        return [(path, "a file")]
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        return [(path, f"cannot be read ({error.strerror})")]
    if any(entry.name in RUN_FILES for entry in entries):
        return [(path, None)]
    below = [found for entry in entries if entry.is_dir() for found in _follow(entry)]
    if any(why is None for _, why in below):
        return below
    return [(path, f"holds {', '.join(entry.name for entry in entries[:3])}" if entries else "empty")]


def _follow(entry: Path) -> list[tuple[Path, str | None]]:
    """Links are followed to run folders alone: others might lead round in a circle."""
    if entry.is_symlink() and not any((entry / mark).exists() for mark in RUN_FILES):
        return [(entry, "a link; name the folder that it points to")]
    return _search(entry)


def _read(folder: Path) -> Run | Other:
    if not (folder / "summary.json").exists():
        return Other(str(folder), "unfinished", _position(folder))
    summary, record = read_json(folder / "summary.json"), read_json(folder / "config.json")
    if summary.get("status") != "finished":
        return Other(str(folder), "unfinished", f"its summary's status is {summary.get('status')!r}")
    _check(summary)
    identity, flags = record.get("identity"), record.get("flags")
    texts = isinstance(identity, dict) and all(isinstance(identity.get(key), str) for key in ("role", "model", "data"))
    if not texts or not isinstance(identity.get("classes"), int | None):
        raise UserError("config.json has no identity of a run")
    try:
        return Run(folder, summary, identity, dict(flags["method"]), str(flags["data"]["source"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.json has no flags of a run ({error!r})") from error


def checked_summary(path: Path) -> dict:
    """A summary.json. Raises UserError where it is none that a run writes."""
    summary = read_json(path)
    try:
        _check(summary)
    except UserError as error:
        raise UserError(f"{path.parent}: {error}") from error
    return summary


def _check(summary: dict) -> None:
    """Raises UserError at the first value that is none which a run writes."""
    for key, (kinds, may_be_null) in KEYS.items():
        value = summary.get(key)
        sound = is_number(value) if kinds is NUMBER else isinstance(value, kinds)
        if not sound and not (value is None and may_be_null):
            raise UserError(f"summary.json has {key} {value!r}")
        if value is not None and key in PERCENT and not 0 <= value <= 100:
            raise UserError(f"summary.json has {key} {value!r}, which is no percentage")
    if summary["params"] < 1:
        raise UserError(f"summary.json has params {summary['params']!r}")
    for key in ("teacher", "teacher_model", "control"):
        if not _names_some(summary.get(key)):
            raise UserError(f"summary.json has {key} {summary[key]!r}")
    teachers = summary.get("teachers", [])
    if not isinstance(teachers, list) or not all(map(_is_member, teachers)):
        raise UserError(f"summary.json has teachers {teachers!r}")
    there = [key for key in TESTED if summary.get(key) is not None]
    if there and (len(there) < len(TESTED) or summary["test_images"] < 1):
        raise UserError(f"summary.json has only {', '.join(there)} of a test result")


def teachers_of(summary: dict, key: str = "teacher") -> list[str]:
    """The run folders or names of a summary's teachers, [] if it has none; with `key` "teacher_model" their models.

    The file has a string for one teacher, a list for several, and null for none.
    """
    value = summary.get(key)
    return list(value) if isinstance(value, list) else [value] if value else []


def _names_some(value: object) -> bool:
    """One folder or network, several, or none."""
    names = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(name, str) and "\0" not in name for name in names)


def _is_member(value: object) -> bool:
    """One of several teachers, as kd.finish writes it."""
    return isinstance(value, dict) and isinstance(value.get("folder"), str) and is_number(value.get("agreement"))


def _position(folder: Path) -> str:
    """How far an unfinished run has come."""
    steps = checkpoint.steps(folder / "checkpoint")
    if not steps:
        return "no checkpoint yet"
    return f"step {steps[0]} is saved; continue it with --resume"


#: (kd.model_info) What model.json must hold before a network is built from it: the file may be anybody's.


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


#: (kd.reporting.run_files) What a finished run keeps beside its summary, for the report: the epochs' history, its answers, its class names.


WHOLE = (torch.int64, torch.int32)


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def read_history(run: Run) -> list[dict]:
    """The epochs' lines of metrics.jsonl. Raises UserError where they cannot be read."""
    path = run.path / "metrics.jsonl"
    lines = read_json_lines(path)
    needed = [line.get(key) for line in lines for key in ("epoch", "train/loss", "train/top1")]
    optional = [line[key] for line in lines for key in ("val/loss", "val/top1") if line.get(key) is not None]
    if not lines or not all(map(is_number, needed + optional)):
        raise UserError(f"{path} holds no epochs, or numbers that are none")
    return lines


def read_test_logits(run: Run) -> tuple:
    """Logits (n x k) and labels (n) of the test split as they were scored. Raises UserError where they are not there.

    What does not give the summary's accuracy is another run's, and refused.
    """
    path = run.path / "test_logits.safetensors"
    if not path.exists():
        raise UserError(f"{path} is not there: the run read no test split, or was made before these were kept")
    kept = read_weights(path)
    logits, labels = kept.get("logits"), kept.get("labels")
    if logits is None or labels is None or logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise UserError(f"{path} holds no logits and labels")
    if labels.dtype not in WHOLE or logits.dtype not in FLOATS:
        raise UserError(f"{path} holds {logits.dtype} and {labels.dtype} for logits and labels")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise UserError(f"{path} holds labels that are none")
    if abs(top_k(logits, labels, 1) - run.summary["test_top1"]) > 1e-6:
        raise UserError(f"{path} does not give the accuracy in the summary")
    return logits, labels


def class_names(run: Run, count: int) -> list[str]:
    """Of model.json; numbers where it is not readable or does not fit."""
    try:
        names = read_json(run.path / "model.json").get("classes", [])
    except UserError:
        names = []
    return (
        [str(name) for name in names]
        if isinstance(names, list) and len(names) == count
        else [str(number) for number in range(count)]
    )


def finished_summary(path: Path, tested: bool = False) -> dict | None:
    """A finished run's summary; with `tested`, of one that has read the test split as well."""
    if not (path / "summary.json").exists():
        return None
    summary = read_json(path / "summary.json")
    finished = summary.get("status") == "finished" and not (tested and summary.get("test_top1") is None)
    return summary if finished else None


def read_model(folder: Path) -> tuple[dict, dict]:
    """A finished run's model.json and summary.json. Raises UserError where the folder holds none."""
    require(folder.is_dir(), f"{folder}: no such run folder")
    summary = finished_summary(folder)
    require(summary is not None, f"{folder} is no finished run: it has no summary.json; finish it with --resume")
    require(isinstance(summary.get("model"), str), f"{folder / 'summary.json'} names no model")
    info = read_json(folder / "model.json")
    check_info(folder / "model.json", info)
    return info, summary


def weights_sha256(folder: Path) -> str:
    """The sha256 of a finished run's weights. Raises UserError where the folder holds none, or others."""
    _, summary = read_model(folder)
    return checked_weights_sha256(folder, summary)


def checked_weights_sha256(folder: Path, summary: dict) -> str:
    """The sha256 of the weights, seen to be the one that the run wrote down (since it does)."""
    path = folder / "model.safetensors"
    require(path.is_file(), f"{path} is not there: copy the whole run folder")
    sha256 = sha256_file(path)
    same = summary.get("weights_sha256", sha256) == sha256
    require(same, f"{path} changed since its run wrote it: copy the run folder again, or train it anew")
    return sha256
