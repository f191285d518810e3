"""The folder of one run: its identity, its lock, its config.json, and whether it is new, resumable or finished."""

import dataclasses
import hashlib
import json
import platform
import shlex
import subprocess
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState

from kd.config import Job, NoneConfig
from kd.data import Data
from kd.data.sources import BUILT_IN
from kd.errors import UserError, require
from kd.runs import checkpoint
from kd.runs.handover import announce
from kd.runs.nodes import share_run
from kd.runs.results import PROBE_SCORES, finished_summary, read_config, weights_sha256
from kd.utils.files import write_json
from kd.utils.processes import all_do, from_main, node, wait_for
from kd.utils.system import Lock, cpu_name

# Flags added after the first runs. At these values they change nothing, so older runs keep their identity and folder.
DEFAULTS_OF_NEWER_FLAGS = {
    "imbalance": 1.0,
    "balance": "none",
    "stored_size": None,
    "stream": False,
    "shuffle_rows": 4096,
    "resized_crop": 0.0,
    "colour_jitter": 0.0,
    "drop_last": True,
    "image": None,
    "test_fraction": 0.2,
    "skip_broken": False,
    "no_labels": False,
    "label_weight": 1.0,
    "label_smoothing": 0.0,
    "policy": "none",
    "policy_ops": None,
    "policy_magnitude": None,
    "hue": 0.0,
    "grey": 0.0,
    "blur": 0.0,
    "vertical_flip": False,
    "crop_ratio": (3 / 4, 4 / 3),
    "resized_crop_max": 1.0,
    "alternating_flip": False,
    "mix_off_epochs": 0,
    "strong_ops": 2,
    "strong_magnitude": None,
    "strong_cutout": 0.5,
    "optimizer": "sgd",
    "betas": (),
    "eps": None,
    "decay_norm_and_bias": True,
    "layer_decay": None,
    "ema": None,
    "accumulate": 1,
    "gradient_checkpointing": False,
    "min_lr": 0.0,
    "warmup_start": None,
    "steps": None,
    "compile_mode": "default",
    "label_share": 1.0,
    "cache_from": None,
}


def without_newer_defaults(flags: dict) -> dict:
    return {key: value for key, value in flags.items() if DEFAULTS_OF_NEWER_FLAGS.get(key, ...) != value}


@dataclass
class RunFolder:
    """A run's own folder, locked by this process until it dies or the `with` block ends."""

    path: Path
    identity: dict
    wandb_id: str = ""
    lock: Lock | None = None
    summary: dict | None = None  # of a finished run
    resuming: bool = False  # there is a checkpoint to continue from

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def release(self) -> None:
        if self.lock is not None:
            self.lock.close()


class RunInputs(NamedTuple):
    """What a run depends on beside its job and data."""

    teacher_sha256: str | None = None
    teachers: Sequence[str] = ()  # their folders or names, so that config.json can repeat the run (--config)
    method: dict = {}  # noqa: RUF012  DistillationLoss.identity(); never mutated
    shared_cache: dict = {}  # noqa: RUF012  source and sha256 of a teacher's logits from elsewhere; never mutated
    teacher_flags: dict = {}  # noqa: RUF012  that --teacher needs beside it, for config.json; never mutated


NO_INPUTS = RunInputs()


def run_identity(job: Job, data: Data, accelerator: Accelerator, inputs: RunInputs = NO_INPUTS) -> dict:
    """Everything that changes a run's result, flat: flags, precision, the data's content, the teacher's weights."""
    parts = {name: dataclasses.asdict(getattr(job, name)) for name in ("data", "views", "fit", "method")}
    # Not where the data lies and how it is stored; its content counts, and for a stream also the order of its rows.
    for name in ("source", "decode", "workers", *(() if job.data.stream else ("shuffle_rows",))):
        del parts["data"][name]
    if not job.method.two_views:
        parts["views"] = {name: value for name, value in parts["views"].items() if name not in job.views.strong}
    parts["fit"]["mixed_precision"] = accelerator.mixed_precision
    del parts["fit"]["lr_per_256"]  # `lr` holds what it comes to
    flat = without_newer_defaults({key: value for part in parts.values() for key, value in part.items()})
    if isinstance(job.method, NoneConfig):  # its first runs had the flag already
        flat["label_smoothing"] = job.method.label_smoothing
    if inputs.shared_cache:  # its content counts, not where it lies
        flat |= {"cache_teacher": True, "shared_cache": inputs.shared_cache["sha256"]}
    elif job.cache.cache_teacher and inputs.teacher_sha256:
        flat |= without_newer_defaults(dataclasses.asdict(job.cache))
    if job.compress.asked:
        init = job.compress.init  # its weights count, not its path
        flat |= job.compress.asked | ({"init": _init_sha256(job)} if init else {})
    if job.origin and not job.compress.init:
        flat["origin"] = job.origin.sha256
    flat |= job.start.asked
    flat |= inputs.method
    flat |= {"role": job.role, "model": job.model, "data": data.fingerprint, "teacher": inputs.teacher_sha256}
    return json.loads(json.dumps(flat))  # tuples become lists, as in a file read back


def _init_sha256(job: Job) -> str:
    return job.origin.sha256 if job.origin else weights_sha256(share_run(job.compress.init)[1])


def open_run(job: Job, data: Data, accelerator: Accelerator, inputs: RunInputs = NO_INPUTS) -> RunFolder:
    """Claim the job's folder: new, to be resumed, or finished. The main process alone reads and writes it, ever; the
    others learn from it what is there, and may be on machines without that disk.

    Raises: UserError if the folder has something else, is in use by another process, or cannot be written, or if the
    processes were not started with the same flags and data.
    """
    identity = run_identity(job, data, accelerator, inputs)
    _check_alike(identity)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]
    name = f"{job.role}-{job.model}-seed{job.fit.seed}-{digest}".replace("/", ".").replace(":", ".")
    run = RunFolder(job.run.folder or Path("runs") / job.preset / name, identity)
    new_config = lambda wandb_id: run_config(job, run.identity, wandb_id, data, accelerator)  # noqa: E731

    def claim() -> tuple:
        _claim(run, job, new_config, inputs, data.labelled)
        return run.identity, run.summary, run.resuming

    run.identity, run.summary, run.resuming = from_main(claim)
    return run


def _check_alike(identity: dict) -> None:
    """Raises UserError if a process, on another machine, was started as another run than the main process."""
    main = from_main(lambda: identity)
    differ = _differences(main, identity)
    message = (
        f"{node()}: this is another run than the main process's ({differ}); start every machine with the same"
        " command, on a copy of the same data"
    )
    all_do(lambda: require(not differ, message))


def _claim(run: RunFolder, job: Job, new_config: Callable[[str], dict], inputs: RunInputs, labelled: bool) -> None:
    """Lock the folder and find out what is in it; a new run's config.json is written."""
    try:
        announce(job.role, run.path)
        check_folder(run.path, job.run.resume)
        run.path.mkdir(parents=True, exist_ok=True)
        run.lock = Lock(run.path / "lock")
        if job.run.auto_resume:  # another student may be training this very teacher or control: wait and share it
            wait_for(run.lock, f"waiting for another process to finish {run.path}")
        else:
            require(run.lock.acquire(), f"{run.path} is in use by another process; wait, or choose another --out")
        _read_state(run, job, labelled)
        if run.summary is None and run.resuming:
            _tell_machine(run.path, new_config(run.wandb_id))
        elif run.summary is None:
            run.wandb_id = uuid.uuid4().hex[:8]
            config = new_config(run.wandb_id) | {"teacher": list(inputs.teachers)}
            config |= {"teacher_flags": inputs.teacher_flags} if inputs.teacher_flags else {}
            config |= {"shared_cache": inputs.shared_cache} if inputs.shared_cache else {}
            write_json(run.path / "config.json", config)
    except BaseException as error:
        run.release()
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {run.path} ({error}); choose another --out") from error
        raise


# A kill during the very first write leaves the first two; the others are of file managers.
WORTHLESS = ("lock", ".config.json.partial", ".DS_Store", "Thumbs.db", "desktop.ini")


def check_folder(path: Path, resume: bool) -> None:
    """Raise UserError if there is nothing to `resume`, or the folder is there and no run's."""
    require(path.exists() or not resume, f"--resume: {path} has no checkpoint; leave the flag out to start")
    if not path.exists():
        return
    names = sorted(entry.name for entry in path.iterdir() if entry.name not in WORTHLESS)
    require(
        not names or "config.json" in names,
        f"{path} is not a run folder (it has {', '.join(names[:3])}); choose another --out",
    )


def _read_state(run: RunFolder, job: Job, labelled: bool = True) -> None:
    """Set whether the folder's run is new, to be resumed, or finished. Raises UserError if it is another run.

    One on data that is not `labelled` has no test split to read.
    """
    path = run.path
    run.resuming = bool(checkpoint.steps(path / "checkpoint"))
    if (path / "config.json").exists():
        config = read_config(path)
        run.wandb_id = str(config.get("wandb_id", ""))
        run.identity = _extended(path, config["identity"], run.identity)
        if job.run.resume and _only_longer(config["identity"], run.identity):
            _extend(run, config, job)
        else:
            _check_same(path, config["identity"], run.identity)
    run.summary = _finished(run, job.run.test and labelled)
    if run.summary is not None and not job.fit.sync_batchnorm:
        _tell_processes(path)
    if run.summary is not None and job.run.probe is not None:
        _tell_unprobed(run, job)
    if run.summary is None and _finished(run) is not None:  # trained, and only the test split is unread
        require(
            run.resuming,
            f"{path} never read the test split and has no checkpoint to score from; remove the folder and train again",
        )
    elif run.summary is None:
        require(run.resuming or not job.run.resume, f"--resume: {path} has no checkpoint; leave the flag out to start")
        require(
            not run.resuming or job.run.resume or job.run.auto_resume,
            f"{path} has an unfinished run: add --resume to continue it, or remove the folder",
        )
        trained = not run.resuming and _has_epochs(path)
        require(
            not trained or job.run.auto_resume,
            f"{path} has epochs in metrics.jsonl and no checkpoint to continue from; to start again, remove the folder",
        )
        if job.run.auto_resume and not run.resuming and (job.run.out or trained):
            print(f"{path}: nothing to resume, starting afresh", flush=True)


def _tell_processes(path: Path) -> None:
    """Say if a finished run was trained by another number of processes: it is no part of a run's identity."""
    before, now = read_config(path).get("processes"), PartialState().num_processes
    if before not in (None, now):
        share = "all" if before == 1 else f"1/{before}"
        print(
            f"{path}: was trained by {before} process{'es' * (before > 1)}, and this launch has {now}: BatchNorm, if it"
            f" has any, saw {share} of each batch",
            flush=True,
        )


def _tell_machine(path: Path, here: dict) -> None:
    """Say if an unfinished run continues on another kind of machine: neither is a part of its identity.

    `here`: what config.json would say of a run that started now.
    """
    started, now = (_machine(config) for config in (read_config(path), here))
    changed = [f"{name} {was} before, {now[name]} now" for name, was in started.items() if now.get(name, was) != was]
    if changed:
        print(f"{path}: continues elsewhere ({'; '.join(changed)}); its bits will differ from an undisturbed run's")


def _machine(config: dict) -> dict[str, str]:
    """What decides a run's last bits beside its flags and processes: kind of device, processor or GPU, versions."""
    device = str(config.get("device", "")).partition(":")[0]
    parts = {
        "device": device if device != "cpu" else f"cpu ({config.get('cpu') or 'unknown'})",
        "gpu": config.get("gpu"),
    }
    versions = {name: known for name, known in config.get("versions", {}).items() if name in ("torch", "torchvision")}
    return {name: value for name, value in (parts | versions).items() if value}


def _tell_unprobed(run: RunFolder, job: Job) -> None:
    """Say how to score a finished run on the set of --probe, if it was not."""
    source, label = job.run.probe, job.run.probe_label
    known = run.summary.get("probe_data") == source
    if not known or (job.run.test and any(run.summary.get(key) is None for key in PROBE_SCORES)):
        words = ["python", "-m", "kd.training.probe", str(run.path), "--data", source]
        words += ["--label", label] if label else []
        words += ["--trust-code"] if ":" in job.model else []
        command = shlex.join(words)
        why = "never read the test split of" if known else "finished without"
        print(f"{run.path}: {why} --probe {source}; {command} measures it", flush=True)


def _finished(run: RunFolder, tested: bool = False) -> dict | None:
    """The run's summary if it is finished; that of a shorter run which is being extended does not count."""
    summary = finished_summary(run.path, tested)
    return summary if summary is None or summary.get("epochs") == run.identity["epochs"] else None


def _extended(path: Path, existing: dict, wanted: dict) -> dict:
    """`wanted`, as the run in the folder that was extended to it: those earlier lengths are a part of its identity."""
    return wanted | {key: existing[key] for key in ("extended_from",) if key in existing}


def _only_longer(existing: dict, wanted: dict) -> bool:
    """Whether the wanted run is the existing one with more epochs."""
    others = all(existing.get(key) == wanted.get(key) for key in {*existing, *wanted} - {"epochs"})
    return others and existing["epochs"] < wanted["epochs"]


def _extend(run: RunFolder, config: dict, job: Job) -> None:
    """Make a finished run one of more epochs that is to be resumed. Raises UserError if its schedule does not allow it.

    With a constant learning rate, and images mixed in all epochs or in none, the longer run is the one that would have
    been started as such. Any other schedule would have had other learning rates from its first epoch on: --extend
    continues by those of the new length, and the run's identity says so.
    """
    before, after = config["identity"]["epochs"], run.identity["epochs"]
    require(
        finished_summary(run.path) is not None,
        f"{run.path} is an unfinished run of {before} epochs: finish it first (--epochs {before}), then extend it",
    )
    require(run.resuming, f"{run.path} has no checkpoint left to extend it from; train anew in another --out")
    constant = job.fit.schedule == "constant"
    unmixed = job.views.mixes and job.views.mix_off_epochs > 0
    why = f"its {job.fit.schedule} schedule ended there" if not constant else "its last ones mixed no images"
    jump = " (the learning rate jumps)" * (not constant)
    exact = constant and not unmixed
    require(
        exact or job.run.extend,
        f"--epochs {after}: {run.path} has {before} epochs, and {why}; --extend continues by the schedule of"
        f" {after} epochs{jump}, or train anew in another --out",
    )
    if not exact:
        run.identity["extended_from"] = [*config["identity"].get("extended_from", []), before]
    config["flags"]["fit"]["epochs"] = after
    write_json(run.path / "config.json", config | {"identity": run.identity})
    print(f"{run.path}: extended from {before} to {after} epochs", flush=True)


def _has_epochs(path: Path) -> bool:
    lines = path / "metrics.jsonl"
    return lines.exists() and lines.stat().st_size > 0


def _check_same(path: Path, existing: dict, wanted: dict) -> None:
    differ = _differences(existing, wanted)
    require(not differ, f"{path} has another run ({differ}); choose another --out, or use the flags of that run")


def _differences(there: dict, here: dict) -> str:
    """'epochs 3 there, 4 here; ...'; empty if both identities are equal."""
    keys = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    return "; ".join(f"{key.replace('_', '-')} {there.get(key)} there, {here.get(key)} here" for key in keys)


def run_config(job: Job, identity: dict, wandb_id: str, data: Data, accelerator: Accelerator) -> dict:
    """The content of config.json: identity, flags, versions and machine."""
    source = job.data.source
    packages = ("torch", "torchvision", "accelerate", "datasets", "numpy")
    return {
        "identity": identity,
        "flags": dataclasses.asdict(job),
        "data": {
            "rows": len(data.train.labels),
            "mean": data.mean,
            "std": data.std,
            "classes": len(data.classes),
            "held": data.storage,
            "images_per_class": _images_per_class(data),
            # A name alone does not tell a folder from a Hub id once the file is read on another machine.
            "folder": source not in BUILT_IN and Path(source).expanduser().is_dir(),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "git_commit": _git_commit(),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": str(accelerator.device),
        **_processors(accelerator.device),
        "wandb_id": wandb_id,
    }


def _processors(device: torch.device) -> dict[str, str]:
    """The processor by its maker's name, and the GPU if the run is on one."""
    return {"cpu": cpu_name()} | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def _images_per_class(data: Data) -> list[int]:
    """Of the training split, by class; empty without labels."""
    return torch.bincount(data.train.labels, minlength=len(data.classes)).tolist() if data.labelled else []


def _git_commit() -> str | None:
    try:
        command = ["git", "rev-parse", "HEAD"]
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
