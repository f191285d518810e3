"""The loop: learning rate, scoring, what the teacher and the student are allowed to do, and when it stops."""

import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import kd
from kd.config import DataConfig, FitConfig
from kd.data import Split, load_data
from kd.errors import UserError, exit_code
from kd.losses.base import Distiller
from kd.models import build_model
from kd.models.features import Tap
from kd.runs import checkpoint
from kd.teachers.live import fold_batchnorm
from kd.teachers.load import load_teacher
from kd.training.evaluate import predict_logits
from kd.training.schedule import lr_at
from kd.training.trainer import Trainer
from tests.conftest import ROOT
from tests.run_scripts import STUDENT, distil, metrics_of, teach


def test_cosine_rises_linearly_and_falls_to_zero():
    config = FitConfig(lr=0.1, warmup_epochs=2.0, epochs=10)
    rates = [lr_at(step, 10, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1 / 20)
    assert rates[19] == rates[20] == pytest.approx(0.1)
    assert rates[60] == pytest.approx(0.05)
    assert 0 < rates[99] < 1e-4


def test_step_and_constant():
    config = FitConfig(epochs=10, lr=0.1, schedule="step", milestones=(0.5, 0.75))
    assert [lr_at(step, 10, config) for step in (0, 49, 50, 75)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert lr_at(99, 10, FitConfig(epochs=10, lr=0.1, schedule="constant")) == 0.1


@pytest.mark.parametrize("rows", range(12, 17))
@pytest.mark.parametrize("batch", range(1, 7))
def test_row_25_every_sample_is_scored_exactly_once_in_eval_mode(rows, batch):
    data = load_data(DataConfig(source="synthetic"))
    network = build_model("tests.networks:normalised", 10, data.size).train()
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append((len(inputs[0]), module.training)))
    split = Split(data.test.images[:rows], data.test.labels[:rows])
    logits = predict_logits(network, split, data, Accelerator(cpu=True), batch)
    assert sum(count for count, _ in seen) == rows
    assert not any(training for _, training in seen)
    assert network.training, "left as it was found"
    network.eval()
    mean, std = (torch.tensor(part)[:, None, None] for part in (data.mean, data.std))
    with torch.no_grad():
        wanted = network((split.images / 255 - mean) / std)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("method", ["kd", "fitnet"])  # which ask a folded copy, and the network itself for features
def test_row_23_the_teacher_is_not_changed_and_the_student_trains_in_train_mode(monkeypatch, method):
    teach("--out", "teacher", "--model", "resnet8", "--epochs", "1")
    asked, modes, real_forward = [], [], Distiller.forward

    class Watched(Tap):
        def __init__(self, network, layers):
            super().__init__(network, layers)
            asked.append((network, fingerprint(network)))

    def forward(self, batch, teacher):
        outputs = [teacher.logits, *teacher.features.values()]
        trains = any(part.training for part in asked[0][0].modules())
        modes.append((self.student.training, trains, any(output.requires_grad for output in outputs)))
        return real_forward(self, batch, teacher)

    monkeypatch.setattr("kd.teachers.live.Tap", Watched)
    monkeypatch.setattr(Distiller, "forward", forward)
    small = ["--student", "resnet8", "--epochs", "1", "--diagnose-every", "0"]
    distil("--out", "run", "--teacher", "teacher", *small, method)
    assert modes == [(True, False, False)] * 18
    ((network, before),) = asked
    assert fingerprint(network) == before
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_teacher_keeps_its_own_normalisation(monkeypatch):
    """Trained with other rows held out it has another mean; its logits must be those it gives on its own."""
    teach("--out", "teacher", "--split-seed", "5")
    ours = load_data(DataConfig(source="synthetic"))
    teacher = load_teacher(Path("teacher"), ours, torch.device("cpu"), trust_code=True)
    alone = kd.load("teacher", trust_code=True)
    theirs = load_data(DataConfig(source="synthetic", split_seed=5))
    accelerator = Accelerator(cpu=True)
    assert theirs.mean != ours.mean
    one = predict_logits(teacher.network, ours.test, ours, accelerator, 50)
    other = predict_logits(alone, theirs.test, theirs, accelerator, 50)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("args", [["--classes", "5"], ["--data", "digits"]])
def test_row_22_a_teacher_of_other_classes_is_refused_before_training(args):
    teach("--out", "teacher", *args)
    with pytest.raises(UserError, match=r"teacher teacher knows (5|10) classes and not"):
        distil("--out", "run", "--teacher", "teacher", "--trust-code")
    assert not Path("run/config.json").exists()


def test_row_49_a_teachers_own_code_needs_trust():
    teach("--out", "teacher")
    with pytest.raises(UserError, match="--trust-code"):
        distil("--out", "run", "--teacher", "teacher")
    with pytest.raises(UserError, match="trust_code=True"):
        kd.load("teacher")
    assert not kd.load("teacher", trust_code=True).training


def test_row_27_a_loss_that_is_not_finite_stops_and_nothing_from_it_on_is_saved(monkeypatch):
    real, count = Trainer.record, 0

    def step(self, result, batch):
        nonlocal count
        count += 1
        if count == 20:
            result = result._replace(terms={name: term * torch.nan for name, term in result.terms.items()})
        real(self, result, batch)

    monkeypatch.setattr(Trainer, "record", step)
    with pytest.raises(UserError, match="not finite at step 19; the last good checkpoint is step 18"):
        teach("--out", "run", "--save-every", "9", "--log-every", "7")
    assert checkpoint.steps(Path("run/checkpoint")) == [18, 9]
    assert count == 21, "the next log point"


def test_row_47_out_of_memory_names_the_batch(monkeypatch, capsys):
    def step(self, result, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "record", step)
    assert exit_code(lambda: teach("--out", "run", "--batch-size", "45"), "") == 2
    assert "give a smaller --batch-size than 45, which changes the recipe" in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="--batch-size 901: larger than the training split of 900"):
        teach("--batch-size", "901")


def test_training_learns_and_the_summary_is_complete():
    distil("--out", "run", "--control", "--epochs", "4", "--student", "resnet8", "--lr", "0.1")
    summary = json.loads(Path("run/summary.json").read_text())
    wanted = {
        "status", "script", "method", "model", "params", "seed", "epochs", "steps", "seconds", "images_per_second",
        "val_top1_last", "val_top1_best", "best_epoch", "test_top1", "test_top5", "test_nll", "test_ece",
        "test_top1_best", "teacher", "teacher_model", "teacher_test_top1", "control", "agreement",
    }  # fmt: skip
    assert wanted <= summary.keys()
    assert summary["status"] == "finished"
    assert summary["steps"] == 4 * 18
    assert summary["test_top1"] > 80
    for name in ("config.json", "metrics.jsonl", "model.safetensors", "best.safetensors", "model.json", "curves.png"):
        assert (Path("run") / name).stat().st_size > 0
    lines = metrics_of(Path("run"))
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert all(line["train/loss"] == pytest.approx(line["train/ce"] + line["train/kd"]) for line in lines)
    best = max(lines, key=lambda line: line["val/top1"])
    assert (summary["val_top1_best"], summary["best_epoch"]) == (best["val/top1"], best["epoch"])
    control = json.loads((Path(summary["control"]) / "summary.json").read_text())
    assert (control["method"], control["teacher"], control["steps"]) == ("none", None, summary["steps"])
    assert Path(summary["teacher"]).is_dir()


def test_the_saved_network_is_the_one_that_was_scored():
    teach("--out", "run")
    data = load_data(DataConfig(source="synthetic"))
    logits = predict_logits(kd.load("run", trust_code=True), data.test, data, Accelerator(cpu=True), 50)
    summary = json.loads(Path("run/summary.json").read_text())
    assert 100 * (logits.argmax(1) == data.test.labels).double().mean().item() == summary["test_top1"]


def test_without_validation_its_keys_are_null():
    teach("--out", "run", "--val-fraction", "0")
    summary = json.loads(Path("run/summary.json").read_text())
    assert [summary[key] for key in ("val_top1_last", "val_top1_best", "best_epoch", "test_top1_best")] == [None] * 4
    assert not Path("run/best.safetensors").exists()


def test_a_finished_run_is_shown_and_not_trained_again(monkeypatch, capsys):
    teach("--out", "run")
    monkeypatch.setattr(Trainer, "record", None)
    first = capsys.readouterr().out
    teach("--out", "run")
    assert capsys.readouterr().out.splitlines()[-4:] == first.splitlines()[-4:]


def test_a_control_asked_for_later_stands_in_the_table(capsys):
    distil("--out", "run")
    assert "not measured" in capsys.readouterr().out
    distil("--out", "run", "--control")
    said = capsys.readouterr().out
    assert "not measured" not in said
    assert "distilled against alone" in said


def test_two_runs_of_one_command_are_equal_and_another_seed_is_not():
    teach("--out", "one")
    teach("--out", "two")
    teach("--out", "three", "--seed", "1")
    one, two, three = (Path(name, "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_row_41_bf16_and_clipping_train_and_fp16_is_refused_on_a_cpu(monkeypatch):
    teach("--out", "run", "--mixed-precision", "bf16", "--clip-norm", "0.5")
    with pytest.raises(UserError, match="--mixed-precision fp16: a CPU"):
        teach("--out", "other", "--mixed-precision", "fp16")


class NoWaiting(TorchDispatchMode):
    """Counts operations whose result the host must wait for."""

    waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--views", "2", "--cache-teacher"],
        ["--mixup", "1", "--cutmix", "1", "--erase", "0.5", "--ema", "0.9", "--accumulate", "2"],
    ],
)
def test_the_host_does_not_wait_between_two_log_points(args, monkeypatch):
    real, counts = Trainer.record, []
    watch = NoWaiting()

    def step(self, *arguments):
        real(self, *arguments)
        counts.append(watch.count)

    monkeypatch.setattr(Trainer, "record", step)
    with watch:
        distil("--out", "run", "--log-every", "6", *args)
    student = counts[-36:]
    steps = [after - before for before, after in itertools.pairwise(student)]
    read = {5, 11, 17, 23, 29}  # a log point, or the end of an epoch, lies between these steps and the next
    assert [count for at, count in enumerate(steps) if at not in read] == [0] * 30
    assert all(steps[at] > 0 for at in read), "and the counting works"


COMPILED = f"""
import runpy, sys, torch, kd.training.launch
real, compiled = torch.compile, []
def eagerly(model, **options):
    compiled.append(model)
    return real(model, backend="eager", fullgraph=True)
torch.compile = eagerly
kd.training.launch.compiles = lambda fit, on_cpu: True
sys.argv = ["distill_student.py", *{STUDENT}, "--threads", "1", "--out", "compiled"]
sys.path.insert(0, {str(ROOT)!r})
try:
    runpy.run_path({str(ROOT / "distill_student.py")!r}, run_name="__main__")
finally:
    assert compiled
"""


@pytest.mark.slow
def test_a_compiled_step_trains_like_an_eager_one():
    """What Accelerate and our forward make of a compiled module, without the compiler's own code and time.

    In a process of its own: the shape checks of the tests are nothing that torch could trace.
    """
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    distil("--out", "plain")
    for line, other in zip(metrics_of(Path("compiled")), metrics_of(Path("plain")), strict=True):
        assert line == pytest.approx(other, rel=1e-5)


# Networks of others: ours carry shape checks in the tests, which no tracer gets through.
@pytest.mark.parametrize("name", ["resnet18", "torchvision/mobilenet_v2", "tests.networks:normalised"])
def test_folding_batchnorm_changes_the_last_bits_alone(name):
    network = build_model(name, 10, (32, 32)).train()
    images = torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        network(images)  # running statistics that are not those of a fresh network
        network.eval()
        quick = fold_batchnorm(network)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in quick.modules())
        torch.testing.assert_close(quick(images), network(images), rtol=1e-3, atol=1e-4)


def test_folding_keeps_a_networks_own_hooks_and_shared_layers():
    network = build_model("tests.networks:normalised", 10, (16, 16)).eval()
    images = torch.randn(4, 3, 16, 16)
    network.register_forward_pre_hook(lambda _, inputs: inputs[0] * 3)
    torch.testing.assert_close(fold_batchnorm(network)(images), network(images))
    conv, norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)
    norm(torch.randn(50, 3, 4, 4))
    twice = torch.nn.Sequential(conv, norm, conv).eval()
    torch.testing.assert_close(fold_batchnorm(twice)(images), twice(images))


def test_row_22_a_teachers_classes_are_matched_by_name():
    teach("--out", "teacher")
    data = load_data(DataConfig(source="synthetic"))
    device, accelerator = torch.device("cpu"), Accelerator(cpu=True)
    plain = predict_logits(load_teacher(Path("teacher"), data, device, True).network, data.test, data, accelerator, 50)
    order = [3, 1, 7]
    fewer = dataclasses.replace(data, classes=tuple(data.classes[number] for number in order))
    matched = load_teacher(Path("teacher"), fewer, device, True)
    torch.testing.assert_close(predict_logits(matched.network, data.test, fewer, accelerator, 50), plain[:, order])
    other = dataclasses.replace(data, classes=("heron", *data.classes[1:]))
    with pytest.raises(UserError, match="not 'heron' of the data's 10"):
        load_teacher(Path("teacher"), other, device, True)


def test_a_method_of_hard_labels_refuses_mixed_images():
    with pytest.raises(UserError, match="dkd needs one label for each image: give --mixup 0 and --cutmix 0"):
        distil("dkd", "--mixup", "1")
    assert not Path("runs").exists()
    distil("--mixup", "1", "--cutmix", "1", "--erase", "0.3", "--epochs", "1", "--out", "run", "kd")
    assert Path("run/summary.json").exists()


def test_a_view_that_channels_last_does_not_allow_is_said_before_training(capsys):
    with pytest.raises(UserError, match=r"viewing: uses .view on a map, .* or give --no-channels-last"):
        distil("--student", "tests.networks:viewing", "--out", "run")
    assert not Path("runs").exists()
    teach("--model", "tests.networks:viewing", "--no-channels-last", "--epochs", "1", "--out", "run")
