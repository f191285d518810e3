"""Both scripts as their users run them: launched, misused, without a key for W&B."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CIFAR100, ROOT, needs_cifar100
from tests.run_scripts import SMALL, STUDENT, TEACHER, metrics_of, script
from tests.wandb_offline import read_offline

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.mark.slow
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
    table = again.stdout[again.stdout.index("┏") :]
    assert len(table) > 500
    assert done.stdout.endswith(table), "the finished run's results are printed again"
    assert "epoch 1/3" not in again.stdout


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
def test_row_33_row_44_what_the_user_did_wrong_ends_in_one_line_and_2(args, words, monkeypatch, capfd):
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


@pytest.mark.slow
def test_row_42_wandb_without_a_key_goes_offline_and_changes_nothing(monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", "/nonexistent")
    done = script("train_teacher.py", *TEACHER, "--out", "kept")
    assert done.returncode == 0, done.stderr
    assert "stored offline" in done.stdout
    assert list(Path("kept/wandb").glob("offline-run-*/*.wandb"))
    script("train_teacher.py", *TEACHER, "--out", "without", "--wandb", "disabled")
    assert metrics_of(Path("kept")) == metrics_of(Path("without"))


REPORT = """
from pathlib import Path
from kd.config import RunConfig
from kd.report.build import write_report
from kd.study.__main__ import track_report
out = Path("report")
track_report(write_report(["kept"], out), out, RunConfig(wandb="offline", wandb_group="study"))
"""


@pytest.mark.slow
def test_the_offline_file_holds_all_that_wandb_sync_would_send(monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    common = ["--wandb", "offline", "--wandb-group", "study"]
    done = script("distill_student.py", *STUDENT, *common, "--out", "kept", "--diagnose-every", "5")
    assert done.returncode == 0, done.stderr
    subprocess.run([sys.executable, "-c", REPORT], check=True, capture_output=True)
    teacher, student, report = (
        read_offline(next(Path(folder).glob("wandb/offline-run-*")))
        for folder in (next(Path("runs/report").iterdir()), "kept", "report")
    )
    assert [part.run.run_group for part in (teacher, student, report)] == ["study"] * 3
    assert [part.run.job_type for part in (teacher, student, report)] == ["teacher", "kd", "study"]
    assert student.run.tags == ["report", "tests.networks:normalised", "kd", "synthetic"]
    assert student.run.run_id == json.loads(Path("kept/config.json").read_text())["wandb_id"]
    assert student.config["temperature"] == 5
    *epochs, media = student.history
    for line, logged in zip(metrics_of(Path("kept")), epochs, strict=True):
        assert line.items() <= logged.items()
    # One naming for both scripts: the student has what its teacher adds, and nothing else under another name.
    assert set(teacher.history[0]) < set(epochs[0])
    assert "train/gradient_ratio" in epochs[0]
    summary = json.loads(Path("kept/summary.json").read_text())
    assert {key: student.summary[key] for key in summary} == summary
    table = json.loads((student.folder / media["results/path"]).read_text())
    values = [dict(zip(table["columns"], row)) for row in table["data"]]
    assert [row["network"] for row in values] == ["teacher", "student (kd)"]
    assert values[1]["test_top1"] == summary["test_top1"]
    assert (student.folder / media["curves/path"]).stat().st_size > 1000
    (page,) = report.history
    assert "On synthetic/Accuracy/path" in page
    assert (report.folder / page["report/path"]).read_text() == Path("report/report.html").read_text()


DIES = """
import os, signal
from kd.training import tracking
from tests.run_scripts import teach
log = tracking.Tracker.log
def dies(self, line):
    log(self, line)
    if line["epoch"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
tracking.Tracker.log = dies
teach("--out", "run", "--epochs", "3", "--wandb", "offline")
"""


@pytest.mark.slow
def test_the_newest_offline_folder_of_a_killed_run_is_complete(monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    died = subprocess.run([sys.executable, "-c", DIES], capture_output=True, timeout=300)
    assert died.returncode == -signal.SIGKILL
    done = script("train_teacher.py", *TEACHER, "--out", "run", "--epochs", "3", "--wandb", "offline", "--resume")
    assert done.returncode == 0, done.stderr
    *_, newest = sorted(Path("run/wandb").glob("offline-run-*"))
    kept = read_offline(newest)
    *epochs, media = kept.history
    lines = metrics_of(Path("run"))
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(line.items() <= logged.items() for line, logged in zip(lines, epochs, strict=True))
    assert [logged["_step"] for logged in kept.history] == [0, 1, 2, 3]
    assert "curves/path" in media


@pytest.mark.slow
@needs_cifar100
def test_the_real_cifar100_starts():
    args = ["--data", str(CIFAR100), "--classes", "2", "--model", "resnet8", "--epochs", "1", "--lr", "0.05"]
    done = script("train_teacher.py", *args, "--out", "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["test_images"] == 200
    assert summary["test_top1"] > 55


@pytest.mark.slow
def test_resuming_on_a_terminal_or_not_prints_an_epoch_a_line():
    done = script("train_teacher.py", *SMALL, "--model", "tests.networks:plain", "--out", "run")
    lines = [line for line in done.stdout.splitlines() if " epoch " in line]
    assert len(lines) == 2
    assert "val/top1" in lines[0]
    assert lines[1].endswith("0:00:00 left")
