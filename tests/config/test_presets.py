"""Which preset is meant where none is given, and the numbers that `own` takes from the data."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import distill_student
from kd.config import FitConfig, cli
from kd.config.defaults import REPORT_DATA, distill_defaults, settle, train_defaults
from kd.data.sources import BUILT_IN, HUB_SETS
from kd.study.plan import read_command_line
from tests.run_scripts import script, teach

OWN = distill_defaults("own").fit
ONE = ["--epochs", "1", "--batch-size", "32"]
NETWORKS = ["--student", "tests.networks:plain", "--teacher-model", "tests.networks:plain", "--wandb", "disabled"]


@pytest.fixture
def photos(tmp_path) -> str:
    """Two classes of one colour each: 36 images to train on with --val-fraction 0.1, 8 to test."""
    for split, count in (("train", 20), ("test", 4)):
        for label in (0, 1):
            place = tmp_path / "photos" / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(number).normal(80 + 90 * label, 30, (12, 12, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number}.png")
    return str(tmp_path / "photos")


def test_the_reports_data_is_what_the_sources_call_so():
    assert set(REPORT_DATA) == {*BUILT_IN, "cifar100", HUB_SETS["cifar100"].address}


@pytest.mark.parametrize(
    ("args", "preset"),
    [
        ([], "report"),
        (["--data", "cifar100"], "report"),
        (["--data", "uoft-cs/cifar100@main"], "report"),
        (["--data", "digits"], "report"),
        (["--data=synthetic"], "report"),
        (["--data", "photos"], "own"),
        (["--data=photos"], "own"),
        (["--data", "cifar10"], "own"),
        (["--epochs", "3", "--data", "photos"], "own"),
        (["--data", "photos", "--preset", "strong"], "strong"),
        (["--preset", "report", "--data", "photos"], "report"),
        (["--preset", "own", "--data", "cifar100"], "own"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_preset_follows_from_the_data_unless_it_is_given(args, preset):
    for defaults in (train_defaults, distill_defaults):
        parsed = cli.parse(defaults, "", args)
        assert (parsed.preset, parsed.fit.nesterov) == (preset, defaults(preset).fit.nesterov)
    study = read_command_line(args)
    assert study.preset == preset
    assert study.student("kd", 0).args[1:3] == ["--preset", preset]


@pytest.mark.parametrize(
    ("images", "batch", "epochs"),
    [
        (6, 6, 200),
        (40, 8, 200),
        (270, 8, 200),
        (320, 16, 200),
        (1_279, 32, 200),
        (1_280, 64, 200),
        (5_000, 64, 128),
        (45_000, 64, 14),
        (1_281_167, 64, 10),
    ],
)
def test_batch_and_epochs_follow_from_the_number_of_images(images, batch, epochs):
    fit = settle(OWN, images, processes=1)
    assert (fit.batch_size, fit.epochs) == (batch, epochs)
    assert fit.lr == pytest.approx(0.05 * batch / 64)
    assert fit.warmup_epochs == pytest.approx(epochs / 20)
    assert dataclasses.replace(fit, **dict.fromkeys(("epochs", "batch_size", "lr", "warmup_epochs"))) == OWN
    assert settle(fit, 10 * images, processes=1) == fit, "once settled it stays"


def test_what_is_given_stays_and_the_rest_follows_from_it():
    fit = settle(dataclasses.replace(OWN, batch_size=16, epochs=3), 1000, processes=1)
    assert (fit.batch_size, fit.epochs, fit.lr, fit.warmup_epochs) == (16, 3, 0.0125, pytest.approx(0.15))
    fit = settle(dataclasses.replace(OWN, lr=0.1, warmup_epochs=0.0), 1000, processes=1)
    assert (fit.batch_size, fit.lr, fit.warmup_epochs) == (32, 0.1, 0.0)
    assert settle(FitConfig(), 1000, processes=1) == FitConfig()


def test_the_batch_divides_by_the_processes():
    assert [settle(OWN, 270, processes).batch_size for processes in (1, 2, 3, 4, 16)] == [8, 8, 9, 8, 16]


def records(folder: str) -> dict[str, dict]:
    return {path.parent.name.split("-")[0]: json.loads(path.read_text()) for path in Path(folder).glob("*/config.json")}


def test_teacher_control_and_student_train_by_the_same_settled_numbers(photos, monkeypatch, capsys):
    monkeypatch.setattr("kd.config.defaults.EPOCHS", (1, 2))
    distill = cli.parse(distill_defaults, "", ["--data", photos, *NETWORKS])
    distill_student.main(distill)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(f"on {photos}; --preset own, the default for this data")
    assert lines[0] == "recipe own: epochs, batch, lr by the number of images (cosine), seed 0; results in runs/own/"
    settled = [line for line in lines if line.startswith("recipe own for")]
    assert settled == ["recipe own for 36 training images: 2 epochs, 0.1 of them warm-up, batch 8, lr 0.00625"]
    found = records("runs/own")
    assert set(found) == {"teacher", "none", "kd"}
    wanted = {"epochs": 2, "batch_size": 8, "lr": 0.00625, "warmup_epochs": 0.1}
    for record in found.values():
        assert {name: record["flags"]["fit"][name] for name in wanted} == wanted
        assert {name: record["identity"][name] for name in wanted} == wanted
    summary = json.loads(next(Path("runs/own").glob("kd-*/summary.json")).read_text())
    assert (summary["epochs"], summary["steps"]) == (2, 2 * (36 // 8))


def test_students_of_a_study_share_the_teacher_that_the_first_one_trains(photos, monkeypatch):
    monkeypatch.setattr("kd.config.defaults.EPOCHS", (1, 2))
    study = read_command_line(["--data", photos, *NETWORKS, "--seeds", "0", "1"])
    times = []
    for seed in study.seeds:
        distill_student.main(cli.parse(distill_defaults, "", [*study.student("kd", seed).args, "--trust-code"]))
        (teacher,) = Path("runs/own").glob("teacher-*")
        times.append((teacher / "summary.json").stat().st_mtime_ns)
    assert times[0] == times[1]


def test_given_numbers_win(photos):
    teach("--preset", "own", "--data", photos, "--model", "tests.networks:plain", "--out", "run", *ONE)
    fit = json.loads(Path("run/config.json").read_text())["flags"]["fit"]
    assert (fit["epochs"], fit["batch_size"], fit["lr"]) == (1, 32, 0.05)


@pytest.mark.slow
def test_the_real_script_on_ones_own_folder(photos):
    args = ["--data", photos, "--model", "tests.networks:plain", "--wandb", "disabled", "--threads", "1"]
    done = script("train_teacher.py", *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("--preset own, the default for this data")
    again = script("train_teacher.py", *args, "--resume")
    assert again.returncode == 0, again.stderr
    (run,) = Path("runs/own").iterdir()
    assert json.loads((run / "summary.json").read_text())["steps"] == 200 * (36 // 8)


def test_a_teacher_has_its_own_recipe_unless_a_flag_says_otherwise():
    student = distill_defaults("modern")
    teacher = student.teacher_job()
    assert (student.job().fit.epochs, teacher.fit.epochs) == (300, 200)
    assert (teacher.views.policy, teacher.views.mixup, teacher.views.cutmix) == ("none", 0.0, 1.0)
    assert student.control_job().views == student.job().views
    short = cli.parse(distill_defaults, "", ["--preset", "modern", "--epochs", "3", "--mixup", "0.5"])
    assert (short.job().fit.epochs, short.teacher_job().fit.epochs) == (3, 3)
    assert short.teacher_job().views.mixup == 0.5
    sgd = distill_defaults("vit").teacher_job().fit
    assert (sgd.optimizer, sgd.lr, sgd.clip_norm) == ("sgd", 0.1, None)
    assert cli.parse(train_defaults, "", ["--preset", "vit"]).fit == sgd


def test_a_teachers_epochs_follow_from_the_steps():
    """Its own 200 would cut a schedule of as many steps as the student's 300 epochs have."""
    student = cli.parse(distill_defaults, "", ["--preset", "modern", "--steps", "105000"])
    settled = dataclasses.replace(student, fit=settle(student.fit, 45_000, 1))
    assert settled.fit.epochs == 300
    assert settled.teacher_job().fit.epochs == 300


def test_the_student_alone_is_smoothed_as_the_distilled_one_and_the_teacher_is_not():
    student = distill_defaults("quick")
    assert student.control_job().method.label_smoothing == student.method.label_smoothing == 0.1
    assert student.teacher_job().method.label_smoothing == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], False),
        (["--teacher", "runs/x"], True),
        (["--preset", "imagenet"], True),
        (["--preset", "imagenet", "--teacher-model", "mine:net"], False),
        (["--init", "runs/x", "--prune", "0.5"], False),
        (["--preset", "imagenet", "--teacher-model", "mine:net", "--init", "runs/x", "--prune", "0.5"], False),
    ],
)
def test_what_was_trained_here_is_the_users_own_code(flags, named):
    """A preset's own teacher that has given way to another is no --teacher, whose code --trust-code is for."""
    assert cli.parse(distill_defaults, "", flags).is_taught_by_named == named


def test_imagenets_teacher_is_torchvisions():
    assert distill_defaults("imagenet").teachers == ("torchvision/resnet34",)
    assert cli.parse(distill_defaults, "", ["--preset", "imagenet", "--teacher", "runs/x"]).teachers == ("runs/x",)
