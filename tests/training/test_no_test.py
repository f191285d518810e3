"""--no-test: the test split stays unread until the same run is asked for with it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kd import metrics
from kd.errors import UserError
from kd.training import summary
from tests.run_scripts import differences, distil, teach


def summary_of(folder: str) -> dict:
    return json.loads((Path(folder) / "summary.json").read_text())


def test_the_test_split_is_read_later_without_training(monkeypatch, capsys):
    distil("--out", "whole")
    shutil.rmtree(next(Path("runs/report").glob("teacher-*")))

    def read(*args):
        raise AssertionError("the test split was read")

    with monkeypatch.context() as patch:
        patch.setattr("kd.training.summary.score_test_split", read)
        distil("--out", "run", "--no-test")
        distil("--out", "run", "--no-test")  # finished as it was asked for
    assert "the test split was not read" in capsys.readouterr().out
    before, teacher = summary_of("run"), summary_of(next(Path("runs/report").glob("teacher-*")))
    unread = {key for key, value in before.items() if value is None}
    assert unread == {*summary.UNTESTED, "teacher_test_top1", "agreement", "control"}
    assert teacher["test_top1"] is None
    assert not Path("run/test_logits.safetensors").exists()

    # There is nothing left to train, in the teacher's run either.
    monkeypatch.setattr("kd.training.trainer.Trainer.update", read)
    distil("--out", "run")
    assert differences(Path("whole"), Path("run")) == []
    assert summary_of(next(Path("runs/report").glob("teacher-*")))["test_top1"] is not None
    distil("--out", "run", "--no-test")
    assert summary_of("run")["test_top1"] is not None, "a test result is never taken back"


def test_without_its_checkpoint_it_says_so():
    teach("--out", "run", "--no-test")
    shutil.rmtree("run/checkpoint")
    with pytest.raises(UserError, match="never read the test split and has no checkpoint to score from"):
        teach("--out", "run")


def test_the_logits_kept_are_those_that_were_scored():
    teach("--out", "run")
    kept, summary = load_file("run/test_logits.safetensors"), summary_of("run")
    assert len(kept["labels"]) == summary["test_images"]
    assert metrics.top_k(kept["logits"], kept["labels"], 1) == summary["test_top1"]
    assert metrics.nll(kept["logits"], kept["labels"]) == summary["test_nll"]
    assert metrics.ece(kept["logits"], kept["labels"]) == summary["test_ece"]
