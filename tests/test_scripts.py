"""Both scripts as their users run them: launched, misused, without a key for W&B."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest

from tests.conftest import CIFAR100, ROOT, needs_cifar100
from tests.runs import SMALL, TEACHER, metrics_of, script

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def test_the_digits_chain_under_accelerate_launch():
    args = ["--preset", "digits", "--epochs", "3"]
    done = script("distill_student.py", *args, launcher=ACCELERATE)
    assert done.returncode == 0, done.stderr
    assert [row in done.stdout for row in ("teacher", "student alone", "student (kd)", "one seed")] == [True] * 4
    folders = sorted(path.name.split("-seed")[0] for path in Path("runs/digits").iterdir())
    assert folders == ["kd-resnet8", "none-resnet8", "teacher-resnet20"]
    record = json.loads(next(Path("runs/digits").glob("kd-*/config.json")).read_text())
    assert record["processes"] == 1
    assert record["threads"] == len(os.sched_getaffinity(0)), "accelerate launch's OMP_NUM_THREADS=1 is not obeyed"
    again = script("distill_student.py", *args)
    assert again.stdout == done.stdout[done.stdout.index(again.stdout[:60]) :]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data", "digitz"], "did you mean digits"),
        (["--data", "digits", "--student", "resnet9"], "unknown model 'resnet9': did you mean resnet"),
        (["--data", "digits", "--temperature", "0"], "--temperature 0"),
        (["--preset", "crt"], "crt"),
        (["--data", "digits", "dkdx"], "dkdx"),
        (["--data", "digits", "--teacher", "runs/none"], "runs/none: no such run folder"),
        (["--data", "digits", "none", "--batch-size", "2000"], "larger than the training split"),
        (["--data", "nobody/nothing"], "could not be loaded from the Hub"),
        (["--data", "digits", "none", "--out", "/proc/run"], "choose another --out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_user_did_wrong_ends_in_one_line_and_2(args, words, monkeypatch, capfd):
    """The real script, run as __main__ in this process to spare the imports."""
    monkeypatch.setattr(sys, "argv", ["distill_student.py", *args])
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # read at import, perhaps before our setting
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "distill_student.py"), run_name="__main__")
    assert stop.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert words in "".join(lines)
    assert len(lines) == 1 or lines[0].startswith("╭"), "one line, or tyro's box"


def test_a_user_error_of_a_real_process():
    done = script("distill_student.py", "--data", "digits", "--student", "resnet9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown model 'resnet9'")
    assert "Traceback" not in done.stderr


def test_wandb_without_a_key_goes_offline_and_changes_nothing(monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", "/nonexistent")
    done = script("train_teacher.py", *TEACHER, "--out", "kept")
    assert done.returncode == 0, done.stderr
    assert "kept offline" in done.stdout
    assert list(Path("kept/wandb").glob("offline-run-*/*.wandb"))
    script("train_teacher.py", *TEACHER, "--out", "without", "--wandb", "disabled")
    assert metrics_of(Path("kept")) == metrics_of(Path("without"))


@needs_cifar100
def test_the_real_cifar100_starts():
    args = ["--data", str(CIFAR100), "--classes", "2", "--model", "resnet8", "--epochs", "1", "--lr", "0.05"]
    done = script("train_teacher.py", *args, "--out", "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["test_images"] == 200
    assert summary["test_top1"] > 55


def test_resuming_on_a_terminal_or_not_prints_an_epoch_a_line():
    done = script("train_teacher.py", *SMALL, "--model", "tests.networks:plain", "--out", "run")
    lines = [line for line in done.stdout.splitlines() if " epoch " in line]
    assert len(lines) == 2
    assert "val/top1" in lines[0]
    assert lines[1].endswith("0:00:00 left")
