"""The last, incomplete batch of an epoch: left out and said so, or trained on with --no-drop-last."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from kd.config import DataConfig, FitConfig, Job, NoneConfig, RunConfig, ViewConfig
from kd.data import load_data
from kd.data.loader import Batches, check_batch
from kd.errors import UserError
from kd.runs.folder import run_identity
from tests.run_scripts import STUDENT, differences, distil, metrics_of, script, teach, torchrun
from tests.training.test_resume import Killed, die_at

ALL = ["--batch-size", "200", "--no-drop-last"]  # 900 images: four batches of 200 and one of 100


@pytest.fixture(scope="module")
def data():
    return load_data(DataConfig(source="synthetic"))


def job_of(fit: FitConfig) -> Job:
    return Job("teacher", "report", "x", NoneConfig(), DataConfig(source="synthetic"), ViewConfig(), fit, RunConfig())


def shares(data, fit: FitConfig, processes: int = 1, process: int = 0) -> list[list[int]]:
    """The rows of every step of an epoch, as one process gets them."""
    batches = Batches(data, job_of(fit), Accelerator(cpu=True))
    batches.processes, batches.process = processes, process
    return [batch.index.tolist() for batch in batches.epoch(3)]


def test_it_is_left_out_by_default_and_other_images_each_epoch(data):
    assert [len(rows) for rows in shares(data, FitConfig(batch_size=200))] == [200] * 4
    batches = Batches(data, job_of(FitConfig(batch_size=200)), Accelerator(cpu=True))
    seen = [{row for batch in batches.epoch(epoch) for row in batch.index.tolist()} for epoch in (0, 1)]
    assert [len(rows) for rows in seen] == [800, 800]
    assert len(seen[0] | seen[1]) > 850


def test_taken_in_every_image_is_seen_once_and_the_full_batches_stay_as_they_were(data):
    dropped, kept = (shares(data, FitConfig(batch_size=200, drop_last=drop)) for drop in (True, False))
    assert kept[:4] == dropped
    assert len(kept[4]) == 100
    assert sorted(row for rows in kept for row in rows) == list(range(900))


def test_two_processes_share_the_last_batch_evenly(data):
    fit = FitConfig(batch_size=200, drop_last=False)
    alone, pair = shares(data, fit), [shares(data, fit, 2, process) for process in (0, 1)]
    assert [one + other for one, other in zip(*pair, strict=True)] == alone
    assert [len(rows) for rows in pair[1]] == [100] * 4 + [50]


@pytest.mark.parametrize(
    ("batch", "processes", "words"),
    [
        (500, 1, None),
        (300, 1, None),
        (31, 1, "the last batch has one image, too few for BatchNorm"),
        (64, 2, "the last batch has one image per process"),
        (56, 8, "the last batch of 4 images does not divide by the number of processes, 8"),
    ],
)
def test_a_last_batch_that_cannot_be_trained_on_is_refused(batch, processes, words):
    rows = {64: 898}.get(batch, 900)
    check_batch(FitConfig(batch_size=batch), rows, processes)
    if words is None:
        check_batch(FitConfig(batch_size=batch, drop_last=False), rows, processes)
        return
    with pytest.raises(UserError, match=f"^--no-drop-last: {words}.*leave the flag out, or give another --batch-size"):
        check_batch(FitConfig(batch_size=batch, drop_last=False), rows, processes)


def test_a_run_says_how_many_images_it_leaves_out(capsys):
    teach("--batch-size", "200", "--epochs", "1", "--out", "dropped")
    assert "each epoch leaves out 100 of 900 training images, others each time" in capsys.readouterr().out
    teach(*ALL, "--epochs", "1", "--out", "all")
    teach("--batch-size", "300", "--epochs", "1", "--out", "even")
    assert "leaves out" not in capsys.readouterr().out
    steps = [json.loads(Path(run, "summary.json").read_text())["steps"] for run in ("dropped", "all", "even")]
    assert steps == [4, 5, 3]


def test_the_learning_rate_ends_where_the_schedule_does():
    teach(*ALL, "--epochs", "2", "--out", "run")
    steps, lr = zip(*((line["step"], line["lr"]) for line in metrics_of(Path("run"))), strict=True)
    assert steps == (5, 10)
    assert lr[1] == pytest.approx(0.05 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 9 / 10)).item()))


def test_the_loss_of_an_epoch_is_the_mean_over_its_images_not_its_batches(data):
    """At a learning rate that changes nothing it is the network's mean loss over all 900 images."""
    still = ["--model", "tests.networks:plain", "--lr", "1e-30", "--weight-decay", "0", "--epochs", "1"]
    same = ["--no-flip", "--crop-padding", "0"]
    teach(*ALL, *still, *same, "--out", "uneven")
    teach(*still, *same, "--batch-size", "300", "--out", "even")
    losses = [metrics_of(Path(run))[0]["train/loss"] for run in ("uneven", "even")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("step", [4, 5, 7])
def test_killed_before_in_or_after_the_last_batch_it_resumes_to_the_same_bytes(monkeypatch, step):
    args = [*ALL, "--epochs", "2", "--save-every", "1"]
    distil(*args, "--out", "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, step)
        distil(*args, "--out", "run")
    distil(*args, "--out", "run", "--resume")
    assert differences(Path("whole"), Path("run")) == []


def test_a_cached_teacher_gives_the_last_batch_what_a_live_one_gives():
    args = [*ALL, "--epochs", "2", "--views", "2", "--cache-dtype", "float32"]
    distil(*args, "--out", "live")
    distil(*args, "--cache-teacher", "--out", "cached")
    assert [path for path in differences(Path("live"), Path("cached")) if path != "method"] == []


def test_older_runs_keep_their_identity(data):
    """A run made before the flag was there must be found again."""
    accelerator = Accelerator(cpu=True)
    assert "drop_last" not in run_identity(job_of(FitConfig()), data, accelerator)
    assert run_identity(job_of(FitConfig(drop_last=False)), data, accelerator)["drop_last"] is False


@pytest.mark.slow
def test_two_processes_train_on_it_as_one_does():
    plain = [*STUDENT, *ALL, "--student", "tests.networks:plain"]
    two = script("distill_student.py", *plain, "--out", "two", env={"ACCELERATE_USE_CPU": "true"}, launcher=torchrun(2))
    assert two.returncode == 0, two.stderr
    teacher = json.loads(Path("two/summary.json").read_text())["teacher"]
    one = script("distill_student.py", *plain, "--out", "one", "--teacher", teacher, "--trust-code")
    assert one.returncode == 0, one.stderr
    for line, other in zip(metrics_of(Path("one")), metrics_of(Path("two")), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
