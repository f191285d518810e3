"""A finished run that is trained on: as far as its schedule allows it, to the bytes of the longer run."""

import json
from pathlib import Path

import pytest

from kd.errors import UserError
from tests.run_scripts import differences, teach
from tests.training.test_resume import Killed, die_at


def identity(folder: str) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())["identity"]


def test_with_a_constant_rate_it_is_the_longer_run():
    teach("--out", "long", "--schedule", "constant", "--epochs", "3")
    teach("--out", "run", "--schedule", "constant", "--epochs", "2")
    teach("--out", "run", "--schedule", "constant", "--epochs", "3", "--resume")
    assert differences(Path("long"), Path("run")) == []
    assert identity("long") == identity("run")


def test_killed_while_extended_it_ends_in_the_same_bytes(monkeypatch):
    teach("--out", "long", "--schedule", "constant", "--epochs", "3")
    teach("--out", "run", "--schedule", "constant", "--epochs", "2")
    longer = ["--out", "run", "--schedule", "constant", "--epochs", "3", "--resume"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 5)
        teach(*longer)
    teach(*longer)
    assert differences(Path("long"), Path("run")) == []


def test_another_schedule_wants_a_word_and_is_remembered(capsys):
    teach("--out", "run", "--epochs", "2")
    with pytest.raises(UserError, match="--epochs 3: run has 2 epochs, and its cosine schedule ended there; --extend"):
        teach("--out", "run", "--epochs", "3", "--resume")
    assert json.loads(Path("run/summary.json").read_text())["epochs"] == 2
    teach("--out", "run", "--epochs", "3", "--resume", "--extend")
    assert "run: extended from 2 to 3 epochs" in capsys.readouterr().out
    assert json.loads(Path("run/summary.json").read_text())["epochs"] == 3
    assert identity("run")["extended_from"] == [2]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    teach("--out", "run", "--epochs", "3")  # the same command finds it finished
    teach("--out", "run", "--epochs", "4", "--resume", "--extend")
    assert identity("run")["extended_from"] == [2, 3]


def test_epochs_that_mixed_no_images_would_have_mixed_them_in_the_longer_run():
    flags = ["--out", "run", "--schedule", "constant", "--mixup", "1", "--mix-off-epochs", "1"]
    teach(*flags, "--epochs", "2")
    with pytest.raises(UserError, match="run has 2 epochs, and its last ones mixed no images; --extend continues"):
        teach(*flags, "--epochs", "3", "--resume")
    teach(*flags, "--epochs", "3", "--resume", "--extend")
    assert identity("run")["extended_from"] == [2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epochs", "1", "--resume"], "has another run .epochs 2 there, 1 here"),
        (["--epochs", "3"], "has another run .epochs 2 there, 3 here"),
        (["--epochs", "3", "--lr", "0.01", "--resume"], "has another run .epochs 2 there, 3 here; lr"),
    ],
)
def test_what_is_no_extension_is_refused(flags, words):
    teach("--out", "run", "--schedule", "constant")
    with pytest.raises(UserError, match=words):
        teach("--out", "run", "--schedule", "constant", *flags)


def test_an_unfinished_run_is_finished_first(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 20)
        teach("--out", "run", "--schedule", "constant")
    with pytest.raises(UserError, match=r"unfinished run of 2 epochs: finish it first \(--epochs 2\)"):
        teach("--out", "run", "--schedule", "constant", "--epochs", "3", "--resume")
