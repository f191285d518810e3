"""Run folders as they lie on the disk: finished runs, and whatever else was found instead of one."""

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kd import checkpoint
from kd.errors import UserError
from kd.files import is_number, read_json

MARKS = ("config.json", "summary.json", "model.json", "checkpoint")  # any of them makes a folder a run's
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


def collect(patterns: list[str]) -> tuple[list[Run], list[Other]]:
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
    if any(entry.name in MARKS for entry in entries):
        return [(path, None)]
    below = [found for entry in entries if entry.is_dir() for found in _follow(entry)]
    if any(why is None for _, why in below):
        return below
    return [(path, f"holds {', '.join(entry.name for entry in entries[:3])}" if entries else "empty")]


def _follow(entry: Path) -> list[tuple[Path, str | None]]:
    """Links are followed to run folders alone: others might lead round in a circle."""
    if entry.is_symlink() and not any((entry / mark).exists() for mark in MARKS):
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
