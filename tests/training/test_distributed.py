"""Two processes on the CPU: the same numbers as one, stops and failures in common, broken launches refused."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.run_scripts import SMALL, differences, metrics_of, script, torchrun

CPU = {"ACCELERATE_USE_CPU": "true"}
# 101 validation images and 250 test images: shares that do not come out even.
PLAIN = [*SMALL, "--val-fraction", "0.101", "--batch-size", "58"]
TEACHER = [*PLAIN, "--model", "tests.networks:plain"]
NORMALISED = [*SMALL, "--model", "tests.networks:normalised", "--save-every", "5"]


def fault(kind: str, *args: str):
    """train_teacher.py on two processes with a fault in it."""
    return script("tests/faults.py", kind, str(ROOT / "train_teacher.py"), *args, env=CPU, launcher=torchrun(2))


def summary_of(folder: str) -> dict:
    return json.loads((Path(folder) / "summary.json").read_text())


@pytest.mark.slow
def test_row_25_row_46_two_processes_train_and_score_as_one_does():
    networks = ["--student", "tests.networks:plain", "--teacher-model", "tests.networks:plain"]
    two = script("distill_student.py", *PLAIN, *networks, "--out", "two", env=CPU, launcher=torchrun(2))
    assert two.returncode == 0, two.stderr
    teacher = summary_of("two")["teacher"]
    one = script("distill_student.py", *PLAIN, *networks, "--out", "one", "--teacher", teacher, "--trust-code")
    assert one.returncode == 0, one.stderr
    for line, other in zip(metrics_of(Path("one")), metrics_of(Path("two")), strict=True):
        assert line["lr"] == other["lr"]
        assert line == pytest.approx(other, rel=1e-4)
    assert summary_of("one")["test_top1"] == summary_of("two")["test_top1"]
    assert json.loads(Path("two/config.json").read_text())["processes"] == 2
    found = script("distill_student.py", *PLAIN, *networks, "--out", "two")
    said = "two: was trained by 2 processes, and this launch has 1: BatchNorm, if it has any, saw 1/2 of each batch"
    assert said in found.stdout


@pytest.mark.slow
def test_two_processes_see_the_views_that_one_sees():
    views = ["--policy", "augmix", "--blur", "0.5", "--alternating-flip", "--cutmix", "1", "--mix-off-epochs", "1"]
    two = script("train_teacher.py", *TEACHER, *views, "--out", "two", env=CPU, launcher=torchrun(2))
    assert two.returncode == 0, two.stderr
    one = script("train_teacher.py", *TEACHER, *views, "--out", "one")
    assert one.returncode == 0, one.stderr
    for line, other in zip(metrics_of(Path("one")), metrics_of(Path("two")), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("two") / "whole"
    done = script("train_teacher.py", *NORMALISED, "--out", str(folder), env=CPU, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_row_3_killed_on_two_processes_it_resumes_to_the_same_bytes(whole):
    killed = fault("kill:24", *NORMALISED, "--out", "run")
    assert killed.returncode != 0
    assert not Path("run/summary.json").exists()
    resumed = script("train_teacher.py", *NORMALISED, "--out", "run", "--resume", env=CPU, launcher=torchrun(2))
    assert resumed.returncode == 0, resumed.stderr
    assert differences(whole, Path("run")) == []


@pytest.mark.slow
def test_row_13_resuming_with_another_number_of_processes_is_refused():
    killed = fault("kill:24", *TEACHER, "--out", "run")
    assert killed.returncode != 0
    resumed = script("train_teacher.py", *TEACHER, "--out", "run", "--resume")
    assert resumed.returncode == 2
    assert "was trained with 2 processes, and this launch has 1" in resumed.stderr


@pytest.mark.slow
def test_row_27_a_loss_that_is_not_finite_on_one_process_stops_both():
    done = fault("nan:20:1", *TEACHER, "--out", "run", "--log-every", "4")
    assert done.returncode != 0
    assert "not finite at step 19; the last good checkpoint is step 15" in done.stderr


@pytest.mark.slow
def test_row_39_an_error_in_one_process_ends_both_and_is_shown():
    start = time.monotonic()
    done = fault("raise:20:1", *TEACHER, "--out", "run")
    assert done.returncode != 0
    assert "RuntimeError: the injected fault" in done.stderr
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_row_38_sigterm_to_one_of_two_processes_saves_the_same_step_on_both(whole):
    args = [*NORMALISED, "--out", "run", "--log-every", "6"]
    done = fault(f"signal:20:1:{int(signal.SIGTERM)}", *args)
    assert "saved: step 24" in done.stderr
    resumed = script("train_teacher.py", *args, "--resume", env=CPU, launcher=torchrun(2))
    assert resumed.returncode == 0, resumed.stderr
    assert differences(whole, Path("run")) == []


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused():
    done = script("train_teacher.py", *SMALL, "--batch-size", "51", "--model", "resnet8", env=CPU, launcher=torchrun(2))
    assert done.returncode != 0
    assert "--batch-size 51: must be a multiple of the number of processes, 2" in done.stderr


@pytest.mark.slow
def test_row_40_launches_that_would_silently_train_alone_are_refused():
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    for launcher in (torchrun(2), accelerate):
        done = script("train_teacher.py", *TEACHER, launcher=launcher)
        assert done.returncode != 0
        assert "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N" in done.stderr
    assert not Path("runs").exists()
