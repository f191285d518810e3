"""Compare what two versions of the code write: every number of every file, and the names of all files and folders.

    python -m tests.same_bytes COMMIT                     what COMMIT writes, and what this checkout writes
    python -m tests.same_bytes COMMIT --only two stream   these commands alone, and those whose runs they need

Each command runs in a temporary worktree of COMMIT and in this checkout, on this machine, on the CPU with one thread.
Weights, logits, caches and ONNX files must be equal byte by byte, JSON value by value. Left out: what a clock measured,
ids drawn at random, the commit, versions of packages, files made to be read (pictures, Markdown, HTML, logs), and
files of NEW_FILES that only this checkout writes. A flag that COMMIT does not know counts as at its default.
A line a command; exit code 1 if anything differs or fails, and then the folders are kept.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from kd.config import CacheConfig, DataConfig, FitConfig, RunConfig, ViewConfig
from kd.config.flags import CompressConfig, StartConfig
from kd.runs.checkpoint import steps
from tests.conftest import ROOT
from tests.data.test_workers import images
from tests.run_scripts import CLOCK

CONSOLE = Console()
PATIENCE = 300.0  # seconds that a command may take
SHOWN, SHOWN_OF_FILE = 12, 2  # lines on one command, and on one of its files

LEFT_OUT = {
    *(*CLOCK, "timing", "latency_ms"),
    *("wandb_id", "git_commit", "versions", "cpu"),
    *("held", "notes"),  # sentences: how the images are stored, in config.json; what times amount to, in export.json
    "state.json",  # in a manifest: the sha256 of a file with times in it
}
TO_BE_READ = (".png", ".md", ".html", ".log", ".lock")
NO_RESULTS = ("lock", "tables.json")  # the latter: where on this machine `datasets` keeps its files
LOG = "commands.log"

NEW_FILES = {
    "levels-*.json": "beside decoded data: its levels are counted once, no longer at each start (after 9613a8b)",
    "about.json": "beside a cache of logits: of which teacher and images, for whoever gets it alone (after 9613a8b)",
}
"""Names of files that older versions do not write, each with the reason. One that changed or is missing is reported."""

PARTS = {
    "data": DataConfig,
    "views": ViewConfig,
    "fit": FitConfig,
    "run": RunConfig,
    "cache": CacheConfig,
    "compress": CompressConfig,
    "start": StartConfig,
}
DEFAULTS = {name: {field.name: field.default for field in fields(part)} for name, part in PARTS.items()}
"""Those of the flags in config.json, by their part's name."""


@dataclass(frozen=True)
class Side:
    """One version of the code, and the folder in which its commands run."""

    checkout: Path
    work: Path
    methods: tuple[str, ...] = ()  # that both versions have


Step = Callable[[Side, Path], object]  # runs in a folder below side.work; raises Failed


@dataclass(frozen=True)
class Command:
    """Steps that run one after another in a folder of their own, beside those of the commands that they need."""

    steps: tuple[Step, ...]
    needs: tuple[str, ...] = ()


class Failed(Exception):
    """A command that did not end as it should."""


def environment(side: Side, folder: Path) -> dict[str, str]:
    """One thread on the CPU, offline; caches of the side's own; nothing of the caller's launcher or W&B."""
    alien = ("ACCELERATE_", "TORCHELASTIC_", "WANDB_", "KD_", "HF_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(alien)}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    huggingface = side.work / "huggingface" / folder.name
    kept |= {"PYTHONPATH": str(side.checkout), "KD_CACHE": str(folder / "decoded")}
    kept |= {"HF_HOME": str(huggingface), "HF_DATASETS_CACHE": str(huggingface / "datasets"), "HF_HUB_OFFLINE": "1"}
    kept |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "100"}


def start(side: Side, folder: Path, line: str, output: str) -> subprocess.Popen:
    """Python with these arguments; what it prints goes to the file `output`, messages to the folder's log."""
    args = line.format(checkout=side.checkout).split()
    with open(folder / LOG, "a") as log, open(folder / output, "a") as out:
        options = {"cwd": folder, "env": environment(side, folder), "start_new_session": True}
        return subprocess.Popen([sys.executable, *args], stdout=out, stderr=log, **options)


def finish(process: subprocess.Popen, folder: Path, line: str) -> None:
    """Raises Failed if it hangs or ends with an error."""
    try:
        code = process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise Failed(f"no end after {PATIENCE:.0f} s: {line}") from None
    if code != 0:
        lines = (folder / LOG).read_text(errors="replace").splitlines()
        errors = [text for text in lines if text.startswith("error: ")] or lines or ["no message"]
        raise Failed(f"exit code {code}: {line}: {errors[-1]}")


def run(line: str, output: str = LOG) -> Step:
    return lambda side, folder: finish(start(side, folder, line, output), folder, line)


def stop(line: str, number: int, at: int) -> Step:
    """Send a signal as soon as the run has saved step `at`, in the middle of an epoch."""

    def step(side: Side, folder: Path) -> None:
        process, deadline = start(side, folder, line, LOG), time.monotonic() + PATIENCE
        while max(steps(folder / "run" / "checkpoint"), default=0) < at:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                finish(process, folder, line)
                break
            time.sleep(0.002)
        process.send_signal(number)
        process.wait()
        if (folder / "run" / "summary.json").exists():
            raise Failed(f"ended before the signal: {line}")

    return step


def run_methods(side: Side, folder: Path) -> None:
    """A student of every method that both versions have, one after another."""
    for name in side.methods:
        run(f"{TAUGHT} {name} {OPTIONS.get(name, '')}")(side, folder)


def copy(source: str, target: str) -> Step:
    return lambda side, folder: shutil.copytree(folder / source, folder / target, dirs_exist_ok=True)


FIT = "--epochs 2 --lr 0.05 --log-every 3 --threads 1 --wandb disabled"
SMALL = f"--data synthetic --batch-size 50 {FIT}"
TEACHER = f"{{checkout}}/train_teacher.py {SMALL} --model resnet8"
FILES = f"{{checkout}}/train_teacher.py --data ../../images --batch-size 12 {FIT} --model resnet8"
FILES += " --image-size 16 --stored-size 20 --workers 1"
STUDENT = f"{{checkout}}/distill_student.py {SMALL} --student resnet8"
TAUGHT = f"{STUDENT} --teacher ../train/run"
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2"
SAVING = f"{TAUGHT} --epochs 6 --out run --save-every 3"  # long enough for the signal to come before its end
CACHED = f"{SAVING} --views 2 --cache-teacher --cache-dtype float32"
OPTIONS = {"crd": "--negatives 16", "dkd": "--ramp-epochs 2", "rld": "--ramp-epochs 2"}
STUDY = "--batch-size 100 --epochs 1 --threads 1 --wandb disabled"
COMMANDS = {
    "train": Command((run(f"{TEACHER} --out run"),)),
    "control": Command((run(f"{STUDENT} --teacher-model resnet8 kd --temperature 4 --control"),)),
    "cached": Command((run(f"{TAUGHT} --views 2 --cache-teacher --cache-top-k 3 dkd"),), ("train",)),
    "methods": Command((run_methods,), ("train",)),
    "killed": Command((stop(f"{SAVING} vid", signal.SIGKILL, at=3), run(f"{SAVING} --resume vid")), ("train",)),
    "stopped": Command(
        (stop(f"{CACHED} dist", signal.SIGTERM, at=3), copy(".", "../interrupted"), run(f"{CACHED} --resume dist")),
        ("train",),
    ),
    "handover": Command((copy("../../before/interrupted", "."), run(f"{CACHED} --resume dist")), ("train", "stopped")),
    "two": Command((run(f"{TORCHRUN} {TAUGHT} at"),), ("train",)),
    "workers": Command((run(f"{FILES} --decode workers"),)),
    "stream": Command((run(f"{FILES} --stream --shuffle-rows 16"),)),
    "prune": Command((run(f"{TAUGHT} --init ../train/run --prune 0.3 kd"),), ("train",)),
    "bits": Command((run(f"{TAUGHT} --weight-bits 2 --activation-bits 8 kd"),), ("train",)),
    "mixed": Command(
        (run(f"{TAUGHT} --imbalance 0.2 --balance logit-adjust --mixup 0.4 --cutmix 1 --erase 0.3 kd"),), ("train",)
    ),
    "study": Command((run(f"-m kd.study --preset digits --methods kd --seeds 0 {STUDY}"),)),
    "export": Command(
        (
            copy("../train/run", "run"),
            run("-m kd.export run --all"),
            run("-m kd.predict run ../../images --top 3 --json", "predicted_by_run.json"),
            run("-m kd.predict run/export/model.int8.onnx ../../images --json", "predicted_by_int8.json"),
        ),
        ("train",),
    ),
}
"""Name -> what it runs, in order. `handover` finishes on both sides what COMMIT had begun, with COMMIT's own cache."""


def _read_json(path: Path) -> object:
    return json.loads(path.read_bytes())


def _read_config(path: Path) -> object:
    """With the defaults of flags that its version did not know."""
    config = _read_json(path)
    parts = {name: DEFAULTS.get(name, {}) | flags for name, flags in config["flags"].items() if isinstance(flags, dict)}
    return config | {"flags": config["flags"] | parts}


def _read_costs(path: Path) -> dict:
    """Of a report: the sizes of each network, without its latency."""
    return {key: values[:-1] for key, values in _read_json(path)["networks"].items()}


def _read_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _read_tensors(path: Path) -> dict[str, str]:
    tensors = sorted(load_safetensors(path.read_bytes()).items())  # read in any order
    return {name: f"{array.dtype}{list(array.shape)} {_short(array.tobytes())}" for name, array in tensors}


def _read_archive(path: Path) -> dict[str, str]:
    """The entries of a .pt2 file, but for its random id and the modules that the classes of kd are in."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/serialization_id")}
    return {name: _short(re.sub(rb"\bkd(\.[a-z_]\w*)+\.", b"", content)) for name, content in entries.items()}


def _short(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"


READERS = {
    "config.json": _read_config,
    "costs.json": _read_costs,
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".safetensors": _read_tensors,
    ".pt2": _read_archive,
}
"""A file's name or ending -> what of it is compared; of all others every byte is."""


def compare_folders(one: Path, other: Path) -> list[str]:
    """The differences between two folders, a line each: files that only one has, bytes, values."""
    before, now = _results(one), _results(other)
    found = [f"{path}: only before" for path in sorted(before - now)]
    found += [f"{path}: only now" for path in sorted(now - before) if not any(map(path.match, NEW_FILES))]
    for path in sorted(before & now):
        texts = compare_files(one / path, other / path)
        found += [f"{path}: {text}" for text in texts[:SHOWN_OF_FILE]]
        if len(texts) > SHOWN_OF_FILE:
            found.append(f"{path}: {len(texts) - SHOWN_OF_FILE} more differences")
    return found


def _results(folder: Path) -> set[Path]:
    """The files that are compared, by their place in the folder."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path for path in files if path.name not in NO_RESULTS and path.suffix not in TO_BE_READ}


def compare_files(one: Path, other: Path) -> list[str]:
    """What differs between two files of one kind, the clock aside."""
    before, now = one.read_bytes(), other.read_bytes()
    if before == now:
        return []
    read = READERS.get(one.name) or READERS.get(one.suffix)
    if read is None:
        return [_first_byte(before, now)]
    try:
        values = [read(path) for path in (one, other)]
    except (ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return [f"cannot be read ({error})"]
    found = list(compare_values(*values))
    if one.suffix == ".safetensors" and not found:  # the same tensors, and other metadata
        return [_first_byte(before, now)]
    return found


def compare_values(before: object, now: object, where: str = "") -> Iterator[str]:
    """Where two JSON values differ; floats bit for bit, keys in the same order, those of `LEFT_OUT` passed over."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [[key for key in value if key not in LEFT_OUT] for value in (before, now)]
        yield from (f"{where}{key} only before" for key in keys[0] if key not in now)
        yield from (f"{where}{key} only now" for key in keys[1] if key not in before)
        if keys[0] != keys[1] and set(keys[0]) == set(keys[1]):
            yield f"{where or 'keys'} in another order"
        for key in keys[0]:
            if key in now:
                yield from compare_values(before[key], now[key], f"{where}{key}.")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from compare_values(*pair, f"{where}{number}.")
    elif type(before) is not type(now) or repr(before) != repr(now):  # repr tells NaN from a number, and 0.0 from -0.0
        yield f"{where.removesuffix('.') or 'the file'} {before!r:.60} before, {now!r:.60} now"


def _first_byte(before: bytes, now: bytes) -> str:
    shorter = min(len(before), len(now))
    at = next((number for number in range(shorter) if before[number] != now[number]), shorter)
    return f"byte {at} differs ({len(before)} bytes before, {len(now)} now)"


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[None]:
    """Check the commit out into `folder`, and remove it afterwards."""
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(folder), commit], cwd=ROOT, check=True)
    try:
        yield
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=False)


def ask(side: Side, code: str) -> str:
    """What this code prints, run with the side's own kd; empty if it fails."""
    folder = side.work / "import"
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(side, folder), capture_output=True)
    return done.stdout.decode().strip()


def check_import(side: Side) -> None:
    """Raises Failed unless the side's commands import the side's own code."""
    found = ask(side, "import kd, pathlib; print(pathlib.Path(kd.__file__).resolve().parent.parent)")
    if found != str(side.checkout.resolve()):
        raise Failed(f"{side.checkout}: Python imports kd from {found or 'nowhere'}")


def with_shared_methods(before: Side, now: Side) -> list[Side]:
    """Both sides with the methods that both have; names those that only one has. Raises Failed if it lists none."""
    old, new = (ask(side, "from kd.config import METHODS; print(*METHODS)").split() for side in (before, now))
    if not old or not new:
        raise Failed(f"{(now if old else before).checkout}: kd.config lists no methods")
    for when, names in (
        ("before", [name for name in old if name not in new]),
        ("now", [n for n in new if n not in old]),
    ):
        if names:
            _say(f"not compared, as only {when}: {', '.join(names)}")
    shared = tuple(name for name in old if name in new)
    return [replace(side, methods=shared) for side in (before, now)]


def with_needs(names: list[str]) -> list[str]:
    """The commands in order, those included whose runs the others need."""
    wanted = {need for name in names for need in (name, *COMMANDS[name].needs)}
    return [name for name in COMMANDS if name in wanted]


def run_command(name: str, side: Side) -> str:
    """Run it in its folder; why it failed, else an empty string."""
    folder = side.work / name
    folder.mkdir(parents=True)
    try:
        for step in COMMANDS[name].steps:
            step(side, folder)
    except (Failed, OSError) as failure:  # an OSError: what a failed command before it has not left
        return str(failure)
    return ""


def compare_versions(names: list[str], sides: list[Side]) -> list[str]:
    """Run the commands on both sides at once, print a line each; the names of those that differ or fail."""
    wrong = []
    bar = track(names, "commands", console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal)
    with ThreadPoolExecutor(len(sides)) as pool:
        for name in bar:
            begun = time.monotonic()
            failures = list(pool.map(lambda side, name=name: run_command(name, side), sides))
            found = [f"{when}: {text}" for text, when in zip(failures, ("before", "now")) if text]
            found = found or compare_folders(*(side.work / name for side in sides))
            result = "failed" if any(failures) else "differs" if found else "equal"
            _say(f"{name:9} {result} ({time.monotonic() - begun:.0f} s)")
            wrong += [name] * bool(found)
            for text in found[:SHOWN]:
                _say(f"    {text}")
            if len(found) > SHOWN:
                _say(f"    and {len(found) - SHOWN} more")
    return wrong


def _say(text: str) -> None:
    CONSOLE.print(text, markup=False, highlight=False, soft_wrap=True)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.same_bytes", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("commit", metavar="COMMIT", help="the version to compare with")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="these commands")
    given = parser.parse_args(args)
    known = ["git", "rev-parse", "--verify", "--quiet", f"{given.commit}^{{commit}}"]
    if subprocess.run(known, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        parser.error(f"{given.commit}: no such commit")
    base = Path(tempfile.mkdtemp(prefix="same-bytes-"))
    sides = [Side(base / "checkout", base / "before"), Side(ROOT, base / "now")]
    images(base / "images", (("train", 60), ("test", 12)))  # one for both: a file's path and time tell kd its version
    with worktree(given.commit, base / "checkout"):
        try:
            for side in sides:
                check_import(side)
            sides = with_shared_methods(*sides)
        except Failed as failure:
            parser.error(str(failure))
        wrong = compare_versions(with_needs(given.only), sides)
    if wrong:
        _say(f"not equal to {given.commit}: {', '.join(wrong)}; folders: {base}")
        return 1
    shutil.rmtree(base)
    _say(f"equal to {given.commit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
