"""A student distilled on images without labels: scored by the loss of distillation, resumed to the same bytes."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import kd
from kd.config import DataConfig, KDConfig
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.data import load_data
from kd.errors import UserError
from kd.export.__main__ import main as export
from kd.losses import kd_loss
from kd.report.__main__ import main as report
from kd.runs.table import plain_table
from kd.study import __main__ as study
from kd.teachers.live import live_logits
from kd.teachers.load import load_teacher
from kd.training import evaluate
from kd.training.evaluate import best_epoch, distillation_loss, predict_logits, validation
from kd.training.meter import Meter
from kd.training.setup import build_distiller, name_classes
from kd.types import Step
from tests.losses.test_methods import quick  # noqa: F401  the fixture: no curves, no waiting for the disk
from tests.run_scripts import SMALL, differences, distil, metrics_of, script, teach, torchrun
from tests.training.test_resume import Killed, differs_when_killed

FEW = ["--val-fraction", "0.78", "--batch-size", "50", "--epochs", "2"]  # 220 images: 4 steps, 20 images left out
FREE = ["--no-labels", *FEW, "--trust-code"]
KD = ["kd", "--alpha", "1", "--temperature", "4"]
ALONE = [*FREE, *KD]
CPU = {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A run of a network with BatchNorm and dropout that knows the synthetic pictures."""
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--model", "tests.networks:deep", "--out", "deep", *FEW)
        teach("--model", "tests.networks:plain", "--out", "plain", *FEW)
    return str(folder / "deep")


def student(teacher: str, *args: str) -> None:
    distil("--teacher", teacher, *FREE, *args, *KD)


def summary_of(run: str) -> dict:
    return json.loads((Path(run) / "summary.json").read_text())


def test_it_is_scored_by_the_loss_of_distillation(teacher, capsys):
    student(teacher, "--epochs", "3", "--out", "run")
    summary, lines = summary_of("run"), metrics_of(Path("run"))
    assert not any("top1" in key or key.endswith("/ce") for line in lines for key in line)
    assert all(
        {"train/loss", "train/kd", "train/agreement", "val/loss", "val/agreement"} <= line.keys() for line in lines
    )
    best = min(lines, key=lambda line: line["val/loss"])
    assert summary["labelled"] is False
    assert (summary["best_epoch"], summary["val_loss_best"]) == (best["epoch"], best["val/loss"])
    assert summary["val_loss_last"] == lines[-1]["val/loss"]
    assert summary["val_agreement"] == lines[-1]["val/agreement"]
    accuracies = ("val_top1_last", "val_top1_best", "test_top1", "test_top5", "test_nll", "test_ece", "test_split")
    assert all(summary[key] is None for key in (*accuracies, "test_images", "test_top1_best", "agreement", "control"))
    assert not Path("run/test_logits.safetensors").exists()
    assert json.loads(Path("run/model.json").read_text())["classes"] == [f"picture {n}" for n in range(10)]
    assert json.loads(Path("run/config.json").read_text())["data"]["images_per_class"] == []
    shown = " ".join(capsys.readouterr().out.split())
    assert "no labels: validation loss of distillation" in shown
    assert "student alone" not in shown
    assert kd.load("run", trust_code=True)(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_the_same_command_on_a_finished_run_trains_nothing(teacher, capsys, monkeypatch):
    student(teacher, "--out", "run")
    monkeypatch.setattr("kd.training.trainer.Trainer.__init__", None)  # would raise if called: nor is it scored again
    student(teacher, "--out", "run")
    assert capsys.readouterr().out.count("run folder: run") == 2


def test_the_best_weights_are_those_of_the_lowest_loss(teacher, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr("kd.training.trainer.distillation_loss", lambda *_: {"val/loss": next(losses)})
    kept = {}
    real = kd.training.trainer.Trainer.end_epoch

    def end_epoch(trainer, epoch):
        kept[epoch] = {name: value.clone() for name, value in trainer.distiller.deployed.state_dict().items()}
        real(trainer, epoch)

    monkeypatch.setattr("kd.training.trainer.Trainer.end_epoch", end_epoch)
    student(teacher, "--epochs", "3", "--out", "run")
    best = load_file("run/best.safetensors")
    assert all(torch.equal(best[name], kept[1][name]) for name in best)
    assert summary_of("run")["best_epoch"] == 2


def test_the_best_of_a_labelled_run_is_still_that_of_the_highest_accuracy():
    lines = [
        {"val/loss": 1.0, "val/top1": 50.0},
        {"val/loss": 2.0, "val/top1": 60.0},
        {"val/loss": 0.1, "val/top1": 60.0},
    ]
    assert best_epoch(lines) is lines[1]
    without = [{"val/loss": loss} for loss in (2.0, 1.0, 1.0)]
    assert best_epoch(without) is without[1]
    assert best_epoch([{"train/loss": 1.0}]) is None


@pytest.fixture
def scored(teacher):
    """A student, its teacher, and images without labels."""
    job = parse(distill_defaults, "", [*SMALL, "--student", "tests.networks:normalised", *ALONE]).job()
    data = load_data(dataclasses.replace(job.data, val_fraction=0.1))
    config = parse(distill_defaults, "", [*SMALL, "--teacher", teacher, *ALONE])
    data = name_classes(config, data)
    network = load_teacher(Path(teacher), data, torch.device("cpu"), trust_code=True)
    distiller = build_distiller(job, data, network)
    accelerator = Accelerator(cpu=True)
    return SimpleNamespace(job=job, data=data, teacher=network, distiller=distiller, accelerator=accelerator)


def loss_of(scored, teacher=None) -> dict[str, float]:
    live = live_logits(scored.teacher.network, scored.accelerator)
    scorer = validation(scored.data, scored.job, scored.accelerator)
    return distillation_loss(scored.distiller, teacher or live, scorer, scored.job.fit)


@pytest.mark.parametrize("limit", [1000, 50, 7, 1])
def test_the_loss_on_validation_is_the_mean_over_all_images(scored, monkeypatch, limit):
    monkeypatch.setattr(evaluate, "SCORED", limit)
    data, size = scored.data, scored.job.fit.batch_size
    students, teachers = (
        predict_logits(network, data.val, data, scored.accelerator, size)
        for network in (scored.distiller.deployed, scored.teacher.network)
    )
    found = loss_of(scored)
    assert found["val/loss"] == pytest.approx(kd_loss(students, teachers, 4.0).item(), rel=1e-5)
    agreement = 100 * (students.argmax(1) == teachers.argmax(1)).double().mean().item()
    assert found["val/agreement"] == pytest.approx(agreement, rel=1e-6)


def test_parts_are_of_nearly_equal_size(scored, monkeypatch):
    """A last part of one image would be normalised, or compared, by itself."""
    monkeypatch.setattr(evaluate, "SCORED", 30)
    sizes, live = [], live_logits(scored.teacher.network, scored.accelerator)
    loss_of(scored, lambda batch: (sizes.append(len(batch.label)), live(batch))[1])
    assert sum(sizes) == len(scored.data.val.labels)
    assert max(sizes) <= 30
    assert max(sizes) - min(sizes) <= 1


def test_validation_changes_nothing(scored):
    before = {name: value.clone() for name, value in scored.distiller.state_dict().items()}
    scored.distiller.train()
    loss_of(scored)
    assert scored.distiller.training
    assert all(torch.equal(value, before[name]) for name, value in scored.distiller.state_dict().items())
    assert all(part.grad is None for part in scored.distiller.parameters())


def test_weights_that_rise_with_the_epochs_are_the_full_ones(scored):
    """Whatever the run's length: a run that is extended goes on with comparable losses."""
    epochs = []
    live = live_logits(scored.teacher.network, scored.accelerator)
    loss_of(scored, lambda batch: (epochs.append((int(batch.epoch), bool((batch.label == -1).all()))), live(batch))[1])
    assert set(epochs) == {(evaluate.LAST_EPOCH, True)}


def test_no_label_is_counted():
    meter = Meter(torch.device("cpu"), labelled=False)
    logits = torch.eye(4)
    meter.update(Step(logits, {"kd": torch.tensor(2.0)}), torch.full((4,), -1), torch.tensor(0))
    numbers, bad, _ = meter.read(Accelerator(cpu=True))
    assert numbers == {"train/loss": 2.0, "train/kd": 2.0}
    assert bad is None


PICTURES = """
import numpy as np

def pictures(order):
    from PIL import Image
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(150)]
    labels = [number % 10 for number in range(150)]
    return {"train": list(zip(images, order(labels))), "test": list(zip(images[:20], labels))}

def right(): return pictures(lambda labels: labels)
def permuted(): return pictures(lambda labels: labels[::-1][7:] + labels[:7])
"""


def test_labels_that_are_permuted_change_no_byte(teacher, monkeypatch, tmp_path):
    (tmp_path / "poisoned.py").write_text(PICTURES)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("right", "permuted"):
        mixed = ["--mixup", "0.5", "--cutmix", "1", "--ema", "0.9"]
        student(teacher, "--data", f"poisoned:{name}", "--val-fraction", "0.2", *mixed, "--out", name)
    assert differences(Path("right"), Path("permuted")) == []
    identities = [json.loads(Path(name, "config.json").read_text())["identity"] for name in ("right", "permuted")]
    assert identities[0] == identities[1]


@pytest.mark.parametrize("step", [2, 4, 7])
def test_row_1_row_2_killed_without_labels(teacher, monkeypatch, step):
    assert differs_when_killed(monkeypatch, lambda *flags: student(teacher, "--ema", "0.9", *flags), at=step) == []


def test_row_2_killed_while_the_loss_of_distillation_is_computed(teacher, monkeypatch):
    def dead(*args):
        raise Killed

    student(teacher, "--out", "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("kd.training.trainer.distillation_loss", dead)
        student(teacher, "--out", "run", "--save-every", "4")
    student(teacher, "--out", "run", "--resume")
    assert differences(Path("whole"), Path("run")) == []


@pytest.mark.parametrize(
    "method",
    [
        ["mimic", "--label-weight", "0"],
        ["kd+at", "--kd-alpha", "1", "--at-student-layers", "0", "--at-teacher-layers", "0"],
        ["crld", "--ce-weight", "0"],
    ],
    ids=lambda method: method[0],
)
def test_row_4_killed_with_other_methods_without_labels(teacher, monkeypatch, method):
    def run(*flags):
        distil("--teacher", teacher, "--no-labels", *FEW, "--trust-code", *method, *flags)

    assert differs_when_killed(monkeypatch, run, at=6) == []
    lines = metrics_of(Path("whole"))
    assert not any("train/ce" in line or "train/top1" in line for line in lines)


def test_row_21_a_cached_teacher_gives_the_same_bytes_without_labels(teacher):
    views = ["--views", "2", "--mixup", "0.5", "--cache-dtype", "float32"]
    student(teacher, *views, "--out", "live")
    student(teacher, *views, "--cache-teacher", "--out", "cached")
    student(teacher, *views, "--cache-teacher", "--out", "again")
    assert differences(Path("live"), Path("cached")) == []
    assert differences(Path("live"), Path("again")) == []


def test_row_4_killed_with_a_cached_teacher_without_labels(teacher, monkeypatch):
    cached = ["--views", "2", "--cache-teacher"]
    assert differs_when_killed(monkeypatch, lambda *flags: student(teacher, *cached, *flags), at=6) == []


@pytest.mark.slow
def test_row_3_row_25_two_processes_without_labels(teacher):
    plain = [*SMALL, "--student", "tests.networks:plain", "--teacher", str(Path(teacher).parent / "plain"), *ALONE]
    relations = [*plain[: plain.index("kd")], "kd+sp", "--kd-alpha", "1", "--sp-weight", "10"]
    relations += ["--sp-student-layers", "0", "--sp-teacher-layers", "0"]
    for name, flags in (("kd", plain), ("sp", relations)):
        two = script("distill_student.py", *flags, "--out", f"{name}-two", env=CPU, launcher=torchrun(2))
        assert two.returncode == 0, two.stderr
        one = script("distill_student.py", *flags, "--out", f"{name}-one")
        assert one.returncode == 0, one.stderr
        for line, other in zip(metrics_of(Path(f"{name}-one")), metrics_of(Path(f"{name}-two")), strict=True):
            assert line == pytest.approx(other, rel=1e-4)
    fault = ["kill:6", str(Path(__file__).parents[2] / "distill_student.py")]
    killed = script(
        "tests/faults.py", *fault, *plain, "--save-every", "1", "--out", "run", env=CPU, launcher=torchrun(2)
    )
    assert killed.returncode != 0
    resumed = script("distill_student.py", *plain, "--out", "run", "--resume", env=CPU, launcher=torchrun(2))
    assert resumed.returncode == 0, resumed.stderr
    assert differences(Path("kd-two"), Path("run")) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["kd", "--alpha", "1", "--label-smoothing", "0.1"],
            "--label-smoothing 0.1: .* kd with these flags has",
        ),
        (
            ["mimic", "--label-weight", "0", "--balance", "weights"],
            "--balance weights: .* mimic with these flag",
        ),
        (["pld", "--label-smoothing", "0.1"], "--label-smoothing 0.1: changes cross-entropy, and pld has none"),
        (["deit", "--alpha", "1", "--label-smoothing", "0.1"], "--label-smoothing 0.1: .* deit with these flags has"),
        (["tfkd", "--alpha", "1", "--balance", "weights"], "--balance weights: .* tfkd with these flags has"),
        (
            ["apprentice", "--alpha", "0", "--beta", "0", "--label-smoothing", "0.1"],
            "--label-smoothing 0.1: .* apprentice with these flags has",
        ),
    ],
)
def test_row_44_what_changes_a_cross_entropy_of_weight_0_is_refused(teacher, args, words):
    """On labelled images, too: the student would not change, and its control would."""
    with pytest.raises(UserError, match=words):
        distil("--teacher", str(teacher), "--trust-code", *args)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--no-labels", "kd"], "kd is trained by labels"),
        (["--no-labels", "none"], "a network alone is trained by labels"),
        (["--no-labels", "crd"], "crd is trained by labels"),
        ([*ALONE, "--control"], "--control: a student alone is trained by labels"),
        ([*ALONE, "--label-smoothing", "0.1"], "--label-smoothing 0.1: changes cross-entropy, and kd without labels"),
        ([*ALONE, "--balance", "weights"], "--balance weights: is about classes"),
        ([*ALONE, "--classes", "3"], "--classes 3: is about labels"),
        ([*ALONE, "--label-share", "0.5"], "--label-share 0.5: is about labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_row_44_what_needs_labels_is_refused(teacher, args, words):
    with pytest.raises(UserError, match=words) as caught:
        distil("--teacher", teacher, "--trust-code", *args)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_row_44_a_teacher_is_not_trained_without_labels():
    with pytest.raises(UserError, match="no labels to train a teacher by; name a trained one with --teacher"):
        distil(*ALONE)
    with pytest.raises(UserError, match="a network alone is trained by labels"):
        teach("--no-labels")


def test_a_preset_that_trains_the_student_alone_says_that_it_does_not(teacher, capsys):
    student(teacher, "--preset", "digits", "--data", "synthetic", "--out", "run")
    assert "no labels: the student alone, which would be trained by them, is left out" in capsys.readouterr().out
    assert summary_of("run")["control"] is None


def test_an_unlabelled_folder_needs_no_flag_if_the_method_needs_no_labels(teacher, capsys, tmp_path):
    from tests.data.test_dataset import picture

    (tmp_path / "photos").mkdir()
    for number in range(60):
        picture(number, (16, 16)).save(tmp_path / "photos" / f"{number}.png")
    common = ["--teacher", teacher, "--trust-code", "--data", "photos", "--batch-size", "20", "--epochs", "1"]
    distil(*common, "--out", "run", "kd", "--alpha", "1")
    assert "data: without labels: 0.png is in no class folder\n" in capsys.readouterr().out
    assert json.loads(Path("run/config.json").read_text())["flags"]["data"]["no_labels"] is True
    distil(*common, "--out", "run", "--no-labels", "kd", "--alpha", "1")  # the same run
    with pytest.raises(UserError, match=r"photos: 0.png is in no class folder.*, or give --no-labels"):
        distil(*common, "--out", "other", "kd", "--alpha", "0.5")


def test_of_several_teachers_the_first_names_the_classes(teacher):
    other = str(Path(teacher).parent / "plain")
    distil("--teacher", teacher, other, *ALONE, "--out", "run")
    assert len(json.loads(Path("run/model.json").read_text())["classes"]) == 10


def test_a_run_without_validation_has_no_best_weights(teacher, capsys):
    student(teacher, "--val-fraction", "0", "--epochs", "1", "--batch-size", "500", "--out", "run")
    assert not Path("run/best.safetensors").exists()
    assert summary_of("run")["val_loss_best"] is None
    said = " ".join(capsys.readouterr().out.split())
    assert "no labels, and no validation: no loss of distillation was measured" in said


def test_the_report_of_labelled_and_unlabelled_runs(teacher, capsys, monkeypatch):
    monkeypatch.setattr("kd.report.plots.render", lambda *_: b"png")
    student(teacher, "--out", "runs/free")
    distil("--teacher", teacher, *FEW, "--trust-code", "--out", "runs/labelled", "kd")
    report(["runs/free", "runs/labelled", teacher, "--out", "report", "--trust-code"])
    text = Path("report/report.md").read_text()
    assert "On synthetic, no labels" in text
    assert "On synthetic\n" in text
    unlabelled = text.split("On synthetic, no labels")[1].split("\n## ")[0]
    row = next(line for line in unlabelled.splitlines() if "runs/free" in line)
    assert row.count("no labels") == 8, "every score that needs labels"
    assert f"{summary_of('runs/free')['val_loss_last']:.4f}" in unlabelled
    assert "None" not in text
    assert "nan" not in text.lower()
    titles, rows = plain_table(Path("runs/free"), summary_of("runs/free"))
    assert dict(zip(titles, rows[-1]))["val_loss_last"] == summary_of("runs/free")["val_loss_last"]


def test_curves_show_the_agreement_where_there_is_no_accuracy(teacher):
    from kd.report import plots

    student(teacher, "--out", "run")
    history = metrics_of(Path("run"))
    names = []
    figure = SimpleNamespace(add_subplot=lambda *_, ylabel, **__: names.append(ylabel) or _Axes())
    figure.legend = lambda *_, **__: None
    plots.draw_curves({"run": [history]})(figure)
    assert names == ["loss", "agreement with the teacher (%)"]


class _Axes:
    """Takes what is drawn."""

    xaxis = SimpleNamespace(set_major_locator=lambda *_: None)

    def plot(self, *args, **style):
        return (None,)


def test_the_export_of_an_unlabelled_run(teacher, capsys):
    student(teacher, "--student", "resnet8", "--out", "run")
    with pytest.raises(UserError, match=r"run: was distilled on images without labels.*; add --no-table"):
        export(["run", "--formats", "safetensors"])
    export(["run", "--formats", "safetensors", "--no-table"])
    card = Path("run/export/README.md").read_text()
    assert "distilled on images without labels, so no accuracy is known; its classes are its teacher's" in card
    assert "None" not in card.split("## How to use it")[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--grid", "alpha=1", "temperature=2,4"], "--grid: picks by accuracy on validation"),
        (["--methods", "at"], "--methods at: is trained by labels"),
        (["--grid", "alpha=0.5"], "--methods kd: is trained by labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_row_44_a_study_without_labels_refuses_what_needs_them(flags, words, teacher):
    with pytest.raises(UserError, match=words):
        study.main(["--preset", "report", "--data", "synthetic", "--no-labels", "--teacher", teacher, *flags])


def test_a_study_without_labels_has_no_controls(teacher):
    words = ["--preset", "report", "--data", "synthetic", "--no-labels", "--grid", "alpha=1"]
    asked = study.read_command_line(words)
    assert asked.controls() == []
    config = parse(distill_defaults, "", ["--preset", "report", *asked.rest])
    with pytest.raises(UserError, match="no labels to train a teacher by"):
        study.check_unlabelled(asked, config)
    study.check_unlabelled(asked, dataclasses.replace(config, teacher=(teacher,)))
    shared = dataclasses.replace(config.cache, cache_teacher=True, cache_from="./packed")
    study.check_unlabelled(asked, dataclasses.replace(config, cache=shared))


def test_a_run_that_knows_no_flag_of_labels_keeps_its_identity():
    """The new flags at their defaults are in no identity: tests/runs has folders of older runs too."""
    from kd.runs.folder import without_newer_defaults

    flags = dataclasses.asdict(DataConfig()) | dataclasses.asdict(KDConfig()) | {"label_weight": 1.0}
    assert {"no_labels", "label_weight"}.isdisjoint(without_newer_defaults(flags))
