"""Reading run folders: one reader for each file, and the finished runs among many folders.

A file may come from a stranger or be damaged, so each reader checks that it holds what a run writes.
"""

import glob
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kd.errors import UserError, nearest, require
from kd.metrics import top_k
from kd.runs import checkpoint
from kd.utils.files import is_list, is_number, read_json, read_json_lines, read_weights, sha256_file, write_json

RUN_FILES = ("config.json", "summary.json", "model.json", "checkpoint")  # a folder with any of them is a run's

WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors", "ema": "ema.safetensors"}
"""The files of weights in a finished run's folder: the last step's, the best on validation, the average's (--ema)."""

SHOT_KEYS = ("test_balanced_top1", "test_top1_many", "test_top1_medium", "test_top1_few")

AVERAGED_SCORES = ("test_top1", "test_top5", "test_nll", "test_ece")
"""Scores that a run with --ema has of its averaged weights too, each as KEY_ema."""

TESTED = (*AVERAGED_SCORES, "test_images")  # all of them or none

PROBE_SCORES = ("probe_knn", "probe_linear")
"""Scores of the last weights' embedding, of a run with --probe."""

TEXT, NUMBER = (str,), (int, float)
# Keys of summary.json that others read: the type, and whether null is allowed (no validation split, or --no-test).
KEYS = {
    "script": (TEXT, False),
    "method": (TEXT, False),
    "model": (TEXT, False),
    "params": (NUMBER, False),
    "seed": (NUMBER, False),
    "epochs": (NUMBER, False),
    **dict.fromkeys(("val_top1_last", "val_top1_best", "best_epoch"), (NUMBER, True)),
    **dict.fromkeys((*TESTED, "test_top1_best", "agreement", "teacher_test_top1"), (NUMBER, True)),
    # Only if the training classes differ in size (kd.metrics.rare_class_scores).
    **dict.fromkeys(SHOT_KEYS, (NUMBER, True)),
    # Only of a run on data without labels: the loss of distillation, and agreement with the teacher in percent.
    **dict.fromkeys(("val_loss_last", "val_loss_best", "val_agreement"), (NUMBER, True)),
    # Only with --ema.
    **dict.fromkeys(("val_top1_ema", *(f"{key}_ema" for key in AVERAGED_SCORES)), (NUMBER, True)),
    # Only with --probe.
    **dict.fromkeys(PROBE_SCORES, (NUMBER, True)),
    "probe_data": (TEXT, True),
}
PERCENT = [key for key in KEYS if "top" in key or "ece" in key or "agreement" in key or key in PROBE_SCORES]

FLAG_PARTS = ("data", "views", "fit", "method", "compress", "start")  # of config.json's flags: what shapes the result

LARGEST_SIDE = 4096  # pixels: a larger image would fill the memory before anything is known to be wrong

INTEGERS = (torch.int64, torch.int32)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def finished_summary(folder: Path, tested: bool = False) -> dict | None:
    """summary.json of a finished run; None for an unfinished one, or with `tested` if the test split is unread.

    Raises UserError if the file is damaged.
    """
    if not (folder / "summary.json").exists():
        return None
    summary = read_json(folder / "summary.json")
    if summary.get("status") != "finished" or (tested and summary.get("test_top1") is None):
        return None
    return summary


def checked_summary(path: Path) -> dict:
    """A summary.json. Raises UserError at the first value that no run writes."""
    summary = read_json(path)
    try:
        _check_summary(summary)
    except UserError as error:
        raise UserError(f"{path.parent}: {error}") from error
    return summary


def is_labelled(summary: dict) -> bool:
    """Whether the run's images had labels; without them no accuracy is known."""
    return summary.get("labelled", True)


def teachers_of(summary: dict, key: str = "teacher") -> list[str]:
    """The run folders or names of a summary's teachers, [] if it has none; with `key` "teacher_model" their models.

    The file has a string for one teacher, a list for several, and null for none.
    """
    value = summary.get(key)
    return list(value) if isinstance(value, list) else [value] if value else []


def _check_summary(summary: dict) -> None:
    for key in (*TESTED, "best_epoch"):  # others index them; a run writes null for what it has not
        summary.setdefault(key, None)
    for key, (types, may_be_null) in KEYS.items():
        value = summary.get(key)
        right_type = is_number(value) if types is NUMBER else isinstance(value, types)
        require(right_type or (value is None and may_be_null), f"summary.json has {key} {value!r}")
        percentage = value is None or key not in PERCENT or 0 <= value <= 100
        require(percentage, f"summary.json has {key} {value!r}, which is no percentage")
    require(summary["params"] >= 1, f"summary.json has params {summary['params']!r}")
    for key in ("teacher", "teacher_model"):
        require(_are_names(summary.get(key)), f"summary.json has {key} {summary.get(key)!r}")
    control = summary.get("control")  # one run at most
    require(not isinstance(control, list) and _are_names(control), f"summary.json has control {control!r}")
    teachers = summary.get("teachers", [])
    require(isinstance(teachers, list) and all(map(_is_member, teachers)), f"summary.json has teachers {teachers!r}")
    present = [key for key in TESTED if summary.get(key) is not None]
    require(isinstance(summary.get("labelled", True), bool), f"summary.json has labelled {summary.get('labelled')!r}")
    complete = not present or (len(present) == len(TESTED) and summary["test_images"] >= 1)
    require(complete, f"summary.json has only {', '.join(present)} of a test result")


def _are_names(value: object) -> bool:
    """Whether it names one folder or network, several, or none."""
    names = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(name, str) and "\0" not in name for name in names)


def _is_member(value: object) -> bool:
    """Whether it is one of several teachers, as kd.training.evaluate writes it."""
    return isinstance(value, dict) and isinstance(value.get("folder"), str) and is_number(value.get("agreement"))


def read_config(folder: Path) -> dict:
    """A run's config.json: identity, flags, versions and machine. Raises UserError if it is not what a run writes."""
    path = folder / "config.json"
    config = read_json(path)
    identity, flags = config.get("identity"), config.get("flags")
    valid = isinstance(identity, dict) and isinstance(identity.get("classes"), int | None)
    valid = valid and all(isinstance(identity.get(key), str) for key in ("role", "model", "data"))
    valid = valid and "teacher" in identity and isinstance(flags, dict) and _are_flags(flags)
    valid = valid and all(is_number(identity.get(key, 0)) for key in ("val_fraction", "test_fraction"))
    valid = valid and isinstance(identity.get("init"), str | None)
    valid = valid and all(isinstance(config.get(key, {}), dict) for key in ("versions", "data", "teacher_flags"))
    require(valid, f"{path}: is not a run's configuration; copy the whole run folder again")
    return config


def identity_of(folder: Path) -> dict:
    """The identity of the run in a folder; empty if it cannot be read."""
    try:
        return read_config(folder)["identity"]
    except (UserError, OSError):
        return {}


def _are_flags(flags: dict) -> bool:
    """Whether config.json's flags have the parts and the names that a job has."""
    parts = [flags.get("method"), flags.get("data"), flags.get("run", {}), flags.get("origin") or {}]
    parts += [flags[part] for part in FLAG_PARTS if part in flags]
    if not all(isinstance(part, dict) for part in parts):
        return False
    names = [flags["data"].get("source")] + [part.get(key) or "" for part, key in named_paths(flags)]
    return all(isinstance(name, str) for name in names) and is_number(flags["method"].get("label_smoothing") or 0)


def named_paths(flags: dict) -> list[tuple[dict, str]]:
    """The entries of config.json's flags, --data aside, that may name a path of the machine: (part, key)."""
    parts = flags.get("compress", {}), flags.get("origin") or {}, flags.get("cache", {})
    return list(zip(parts, ("init", "source", "cache_from"), strict=True))


def read_model(folder: Path) -> tuple[dict, dict]:
    """A finished run's model.json and summary.json. Raises UserError if the folder has no finished run."""
    require(
        not folder.is_file(),
        f"{folder}: is a file, not a run folder; a file of weights is taken by distill_student.py --teacher FILE"
        " --teacher-model NAME",
    )
    require(folder.is_dir(), f"{folder}: no such run folder")
    summary = finished_summary(folder)
    require(summary is not None, f"{folder} has no finished run: {_why_no_run(folder)}")
    require(isinstance(summary.get("model"), str), f"{folder / 'summary.json'} names no model")
    info = read_json(folder / "model.json")
    _check_model(folder / "model.json", info)
    return info, summary


def _why_no_run(folder: Path) -> str:
    """What an existing folder without a finished run holds, and what to do."""
    try:
        config = read_json(folder / "config.json")
    except UserError:
        config = {}
    saved_by = config.get("architectures") or config.get("architecture")
    if saved_by:
        name = ", ".join(map(str, saved_by)) if isinstance(saved_by, list) else saved_by
        return (
            f"it holds a network of Transformers or timm ({name}); name the same network as timm/NAME, or the folder of"
            " a download as --teacher FOLDER"
        )
    if any((folder / name).exists() for name in RUN_FILES):
        return "it has no summary.json; finish it with --resume"
    return "it has no summary.json; name the folder of a run"


def _check_model(path: Path, info: dict) -> None:
    missing = {"model", "num_classes", "image_size", "mean", "std", "classes"} - set(info)
    require(not missing, f"{path} lacks {', '.join(sorted(missing))}")
    valid = {
        "model": isinstance(info["model"], str),
        "classes": is_list(info["classes"], lambda name: isinstance(name, str)),
        "num_classes": isinstance(info["classes"], list)
        and info["num_classes"] == len(info["classes"])
        and (info["num_classes"] > 0 or "embedding" in info),
        "embedding": "embedding" not in info or (_is_width(info["embedding"]) and info["num_classes"] == 0),
        "image_size": is_list(info["image_size"], _is_side, 2),
        "mean": is_list(info["mean"], is_number, 3),
        "std": is_list(info["std"], lambda std: is_number(std) and std > 0, 3),
        "stored_size": _is_side(info.get("stored_size") or LARGEST_SIDE),
        "resized": is_list(info.get("resized") or [1, 1], _is_side, 2),
        "model_args": isinstance(info.get("model_args"), str | None),
    }
    if valid["image_size"] and valid["stored_size"] and info.get("stored_size"):
        valid["stored_size"] = info["stored_size"] >= max(info["image_size"])
    wrong = [name for name, fine in valid.items() if not fine]
    require(not wrong, f"{path} has {', '.join(wrong)} that no run writes")


def _is_width(width: object) -> bool:
    return type(width) is int and width > 0


def _is_side(side: object) -> bool:
    return type(side) is int and 0 < side <= LARGEST_SIDE


def weights_sha256(folder: Path) -> str:
    """The sha256 of a finished run's weights. Raises UserError if they are missing or have changed."""
    _, summary = read_model(folder)
    return checked_weights_sha256(folder, summary)


def checked_weights_sha256(folder: Path, summary: dict, weights: str = "last") -> str:
    """The sha256 of a file of WEIGHTS. Raises UserError if it differs from the summary's; of "best" no sum is kept."""
    path = weights_file(folder, weights)
    sha256 = sha256_file(path)
    recorded = {
        "last": summary.get("weights_sha256", sha256),  # the first runs have none
        "ema": summary.get("ema_sha256"),
        "best": sha256,
    }
    same = recorded[weights] == sha256
    require(same, f"{path} changed since its run wrote it: copy the run folder again, or train it anew")
    return sha256


def weights_file(folder: Path, weights: str) -> Path:
    """The file of a run's weights, by a name of WEIGHTS. Raises UserError if there is none."""
    require(weights in WEIGHTS, f"weights {weights!r}: {nearest(weights, WEIGHTS)}")
    path = folder / WEIGHTS[weights]
    why = {
        "last": "copy the whole run folder",
        "best": "a run without validation set has none, nor has an export; of a Hub id only the last are fetched",
        "ema": "only a run with --ema has one, and no export does; of a Hub id only the last are fetched",
    }
    require(path.is_file(), f"{path} is not there: {why[weights]}")
    return path


def summary_of(summary: dict, weights: str) -> dict:
    """A run's summary with the test scores of `weights`: "last" changes nothing, "ema" takes the averaged weights'.

    What is not measured of the average is left out or None: agreement, accuracy on rare classes, the embedding.
    """
    if weights == "last":
        return summary
    rare = [key for key in summary if key in SHOT_KEYS or key == "shots"]
    scores = {key: summary.get(f"{key}_ema") for key in AVERAGED_SCORES}
    others = (*rare, *PROBE_SCORES, "probe_data", "ema_sha256")
    kept = {key: value for key, value in summary.items() if key not in others}
    return kept | scores | {"agreement": None, "weights": weights, "weights_sha256": summary.get("ema_sha256")}


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    summary: dict
    identity: dict
    method_flags: dict
    source: str  # --data as it was given
    init: str = ""  # --init as it was given, if that was a run

    @property
    def seed(self) -> int:
        return self.summary["seed"]

    @property
    def role(self) -> str:
        return self.identity["role"]

    @property
    def tested(self) -> bool:
        return self.summary["test_top1"] is not None


class Other(NamedTuple):
    """A folder that was named and is not counted, since it has no finished run."""

    path: str
    state: str
    why: str


def collect_runs(patterns: list[str]) -> tuple[list[Run], list[Other]]:
    """Every run that the folders or globs name, also inside folders of runs; nothing is left out silently."""
    runs: dict[str, list[Run]] = {}
    others, seen = [], set()
    for pattern in patterns:
        paths = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not paths:
            others.append(Other(pattern, "missing", "no such folder, and no folder matches"))
        for path in paths:
            for folder, reason in _search(path):
                if folder.resolve() in seen:
                    continue
                seen.add(folder.resolve())
                try:
                    run = _read_run(folder) if reason is None else Other(str(folder), "no run", reason)
                except UserError as error:
                    run = Other(str(folder), "broken", str(error))
                if isinstance(run, Run):
                    runs.setdefault(json.dumps(run.identity, sort_keys=True), []).append(run)
                else:
                    others.append(run)
    # Of each identity the first run that is tested counts.
    alike = [sorted(found, key=lambda one: not one.tested) for found in runs.values()]
    others += [_not_counted(one, found[0]) for found in alike for one in found[1:]]
    return [found[0] for found in alike], others


def _not_counted(run: Run, counted: Run) -> Other:
    """One of the same flags, seed and data as a run that is counted: a copy, or trained again, elsewhere or anew."""
    if run.summary.get("weights_sha256") == counted.summary.get("weights_sha256"):
        return Other(str(run.path), "a copy", f"the same run as {counted.path}; counted once")
    score, other = (one.summary["test_top1"] for one in (run, counted))
    numbers = f" (test {score:.2f}, {other:.2f} there)" if run.tested and counted.tested else ""
    why = f"the flags, seed and data of {counted.path}, and other weights{numbers}; the seed counts once"
    return Other(str(run.path), "trained again", why)


def find_run(folder: Path) -> Run | None:
    """The finished run in a folder; None if there is none."""
    try:
        run = _read_run(folder) if (folder / "summary.json").exists() else None
    except (UserError, OSError):
        return None
    return run if isinstance(run, Run) else None


def _search(path: Path) -> list[tuple[Path, str | None]]:
    """Run folders at or below `path`, with None; other paths with the reason. A tree without runs is one entry."""
    if not path.is_dir():
        return [(path, "a file")]
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        return [(path, f"cannot be read ({error.strerror})")]
    if any(entry.name in RUN_FILES for entry in entries):
        return [(path, None)]
    below = [result for entry in entries if entry.is_dir() for result in _follow(entry)]
    if any(reason is None for _, reason in below):
        return below
    return [(path, f"holds {', '.join(entry.name for entry in entries[:3])}" if entries else "empty")]


def _follow(entry: Path) -> list[tuple[Path, str | None]]:
    """As `_search`; links are followed to run folders only, since others might lead round in a circle."""
    if entry.is_symlink() and not any((entry / name).exists() for name in RUN_FILES):
        return [(entry, "a link; name the folder that it points to")]
    return _search(entry)


def _read_run(folder: Path) -> Run | Other:
    if not (folder / "summary.json").exists():
        return Other(str(folder), "unfinished", _progress(folder))
    summary = read_json(folder / "summary.json")
    if summary.get("status") != "finished":
        return Other(str(folder), "unfinished", f"its summary's status is {summary.get('status')!r}")
    _check_summary(summary)
    if summary.get("weights", "last") != "last":
        return Other(str(folder), "an export", f"of a run's weights {summary['weights']!r}; name the run")
    config = read_config(folder)
    if config["identity"].get("epochs", summary["epochs"]) != summary["epochs"]:
        return Other(str(folder), "unfinished", f"being extended from {summary['epochs']} epochs; {_progress(folder)}")
    flags = config["flags"]
    init = flags.get("compress", {}).get("init") if config["identity"].get("init") else None
    return Run(folder, summary, config["identity"], flags["method"], flags["data"]["source"], init or "")


def _progress(folder: Path) -> str:
    """How far an unfinished run has come."""
    steps = checkpoint.steps(folder / "checkpoint")
    return f"step {steps[0]} is saved; continue it with --resume" if steps else "no checkpoint yet"


def read_history(run: Run) -> list[dict]:
    """The epochs' lines of metrics.jsonl. Raises UserError if they cannot be read."""
    path = run.path / "metrics.jsonl"
    lines = read_json_lines(path)
    needed = [line.get(key) for line in lines for key in ("epoch", "train/loss")]
    optional = [
        line[key] for line in lines for key in ("train/top1", "val/loss", "val/top1") if line.get(key) is not None
    ]
    require(
        bool(lines) and all(map(is_number, needed + optional)), f"{path} has no epochs, or values that are not numbers"
    )
    return lines


def read_test_logits(folder: Path, summary: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n x k) and labels (n) of the test split, as they were scored.

    Raises UserError if they are missing, malformed, or do not give the summary's accuracy.
    """
    path = folder / "test_logits.safetensors"
    require(path.exists(), f"{path} is not there: the run read no test split, or an older version made it")
    tensors = read_weights(path)
    logits, labels = tensors.get("logits"), tensors.get("labels")
    shapes = logits is not None and labels is not None and logits.ndim == 2 and labels.shape == logits.shape[:1]
    require(shapes and len(labels) > 0, f"{path} has no logits and labels")
    types = labels.dtype in INTEGERS and logits.dtype in FLOATS
    require(types, f"{path} has {logits.dtype} and {labels.dtype} for logits and labels")
    in_range = bool(labels.min() >= 0) and bool(labels.max() < logits.shape[1])
    require(in_range, f"{path} has labels outside 0..{logits.shape[1] - 1}")
    same = abs(top_k(logits, labels, 1) - summary["test_top1"]) <= 1e-6
    require(same, f"{path} does not give the accuracy in the summary")
    return logits, labels


def read_correct(folder: Path, summary: dict) -> tuple[torch.Tensor, str]:
    """Which test images the run classified correctly (bool n), and the sha256 of their labels.

    From its saved logits, or from what `write_correct` wrote in their place. Raises UserError as read_test_logits does.
    """
    path = folder / "test_correct.json"
    if not path.exists():
        logits, labels = read_test_logits(folder, summary)
        return logits.argmax(dim=1) == labels, hashlib.sha256(labels.long().numpy().tobytes()).hexdigest()
    kept, images = read_json(path), summary["test_images"]
    bits, labels = kept.get("correct"), kept.get("labels_sha256")
    valid = isinstance(bits, str) and re.fullmatch("([0-9a-f]{2})+", bits) and len(bits) // 2 == -(-images // 8)
    require(bool(valid) and isinstance(labels, str), f"{path} is not what a kept run has; keep the run again")
    correct = torch.from_numpy(np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=images)).bool()
    same = abs(100 * correct.double().mean().item() - summary["test_top1"]) <= 1e-6
    require(same, f"{path} does not give the accuracy in the summary")
    return correct, labels


def write_correct(folder: Path, summary: dict, target: Path) -> None:
    """Write test_correct.json into `target`, a bit for each test image: the smallest file that an interval needs."""
    correct, labels = read_correct(folder, summary)
    write_json(
        target / "test_correct.json", {"correct": np.packbits(correct.numpy()).tobytes().hex(), "labels_sha256": labels}
    )


def class_names(run: Run, count: int) -> list[str]:
    """The class names in model.json; numbers if it is not readable or has another number of them."""
    try:
        names = read_json(run.path / "model.json").get("classes", [])
    except UserError:
        names = []
    if isinstance(names, list) and len(names) == count:
        return [str(name) for name in names]
    return [str(number) for number in range(count)]
