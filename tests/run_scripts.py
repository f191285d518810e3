"""Running the scripts from tests, and comparing what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

import distill_student
import train_teacher
from kd.config.cli import parse
from kd.config.defaults import distill_defaults, train_defaults
from tests.conftest import ON_GPU, ROOT

SMALL = ["--data", "synthetic", "--batch-size", "50", "--epochs", "2", "--lr", "0.05", "--log-every", "3"]
SMALL += ["--deterministic"] * ON_GPU  # for bits that repeat
TEACHER = [*SMALL, "--model", "tests.networks:normalised"]
STUDENT = [*SMALL, "--student", "tests.networks:normalised", "--teacher-model", "tests.networks:plain"]
CLOCK = ("images_per_second", "seconds")


def teach(*args: str) -> None:
    """train_teacher.py in this process."""
    train_teacher.main(parse(train_defaults, "", [*TEACHER, "--wandb", "disabled", *args]))


def distil(*args: str) -> None:
    """distill_student.py in this process."""
    distill_student.main(parse(distill_defaults, "", [*STUDENT, "--wandb", "disabled", *args]))


def script(name: str, *args: str, env: dict | None = None, launcher: list[str] | None = None, timeout: int = 300):
    """A script as its user runs it; the completed process with its output as text."""
    command = [*(launcher or [sys.executable]), str(ROOT / name), *args]
    settings = {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=settings)


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def metrics_of(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def newest_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoint").glob("step-*"), key=lambda path: int(path.name[5:]))


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, bit for bit: weights, optimizer, metrics, summary. The one oracle."""
    found = []
    averaged = ["ema.safetensors"] if (one / "ema.safetensors").exists() else []
    pairs = [(one / name, other / name) for name in ("model.safetensors", "best.safetensors", *averaged)]
    checkpoints = newest_checkpoint(one), newest_checkpoint(other)
    saved = ["model.safetensors", "optimizer.safetensors", *averaged]
    pairs += [tuple(c / name for c in checkpoints) for name in saved]
    for ours, theirs in pairs:
        left, right = load_file(ours), load_file(theirs)
        found += [f"{ours.name}: {key}" for key in left.keys() ^ right.keys()]
        same = lambda key: left[key].numpy().tobytes() == right[key].numpy().tobytes()  # noqa: E731, B023
        found += [f"{ours.name}: {key}" for key in left.keys() & right.keys() if not same(key)]
    if metrics_of(one) != metrics_of(other):
        found.append("metrics.jsonl")
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    found += [key for key in summaries[0] if key not in CLOCK and summaries[0][key] != summaries[1].get(key)]
    return found
