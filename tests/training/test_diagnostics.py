"""What training says of itself: true numbers, that change nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.special import log_softmax
from scipy.stats import entropy
from torch.utils.checkpoint import checkpoint

from kd.config import METHODS, DataConfig
from kd.data import load_data
from kd.metrics import closeness
from kd.runs.load import load_network
from kd.training.diagnostics import gradient_norms, warnings
from tests.pairs import batch_of, build
from tests.run_scripts import differences, distil, metrics_of, teach

INDEX = torch.arange(12)
TRUSTED = ("--teacher", "teacher", "--trust-code")


def test_closeness_agrees_with_scipy():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 50, 7, generator=generator) * 3
    labels = torch.randint(7, (50,), generator=generator)
    measures = closeness(ours, theirs, labels, theirs / 4)
    p, q = (log_softmax(logits.double().numpy(), axis=1) for logits in (theirs, ours))
    assert measures["kl"].item() == pytest.approx(entropy(np.exp(p), np.exp(q), axis=1).mean(), rel=1e-5)
    assert measures["teacher_entropy"].item() == pytest.approx(entropy(np.exp(p), axis=1).mean(), rel=1e-5)
    soft = np.exp(log_softmax(theirs.double().numpy() / 4, axis=1))
    assert measures["soft_entropy"].item() == pytest.approx(entropy(soft, axis=1).mean(), rel=1e-5)
    assert measures["agreement"].item() == pytest.approx(100 * (p.argmax(1) == q.argmax(1)).mean(), rel=1e-5)
    assert measures["teacher_top1"].item() == pytest.approx(100 * (p.argmax(1) == labels.numpy()).mean(), rel=1e-5)
    assert "soft_entropy" not in closeness(ours, theirs, labels, None)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("none", "tfkd", "pld", "simkd", "embed")])
def test_gradient_lengths_are_those_of_backward_and_leave_nothing_behind(method):
    distiller, teacher = build(method)
    batch = batch_of(INDEX, method=method)
    answer = teacher.of_batch(batch)
    before = {name: tensor.clone() for name, tensor in distiller.state_dict().items()}
    found = gradient_norms(distiller, batch, answer, Accelerator(cpu=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in distiller.state_dict().items())
    assert all(parameter.grad is None for parameter in distiller.parameters())
    lengths = []
    for kind in (lambda name: name != "ce", lambda name: name == "ce"):
        distiller.load_state_dict(before)  # crd's bank moves with every pass
        terms = distiller(batch, answer).terms
        sum(term for name, term in terms.items() if kind(name)).backward()
        parts = [p.grad.flatten() for p in distiller.student.parameters() if p.grad is not None]
        lengths.append(torch.cat(parts).norm())
        distiller.zero_grad(set_to_none=True)
    torch.testing.assert_close(found, torch.stack(lengths))
    assert (found > 0).all()


def test_what_backward_computes_again_moves_no_statistics():
    """A network that saves memory runs its forward again in each backward, with its own BatchNorm."""
    distiller, teacher = build("kd")
    distiller.student[5] = torch.nn.BatchNorm1d(8)
    inner = distiller.student.forward
    distiller.student.forward = lambda image: checkpoint(inner, image, use_reentrant=False)
    batch = batch_of(INDEX)
    answer, training = teacher.of_batch(batch), distiller.train()
    before = {name: tensor.clone() for name, tensor in training.state_dict().items()}
    accelerator = Accelerator(cpu=True)
    assert (gradient_norms(distiller, batch, answer, accelerator, recomputes=True) > 0).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in distiller.state_dict().items())
    gradient_norms(distiller, batch, answer, accelerator)
    assert not all(torch.equal(before[name], tensor) for name, tensor in distiller.state_dict().items()), "it does move"


def test_training_logs_them_and_ends_in_the_same_bytes_as_without():
    teach("--out", "teacher")
    distil(*TRUSTED, "--out", "often", "--diagnose-every", "1")
    distil(*TRUSTED, "--out", "never", "--diagnose-every", "0")
    keys = {"agreement", "kl", "teacher_top1", "teacher_entropy", "soft_entropy", "gradient_ratio"}
    lines = metrics_of(Path("often"))
    assert all(keys <= {key.removeprefix("train/") for key in line} for line in lines)
    assert all("train/gradient_ratio" not in line for line in metrics_of(Path("never")))
    assert differences(Path("often"), Path("never")) == ["metrics.jsonl"]
    assert lines[-1]["train/kl"] < lines[0]["train/kl"]
    assert not any("kl" in key for line in metrics_of(Path("teacher")) for key in line)


def test_the_teachers_accuracy_on_training_views_is_what_it_says_of_them():
    """Views off, every row once: the mean over an epoch is the teacher's own on the training split."""
    flags = ("--crop-padding", "0", "--no-flip", "--batch-size", "50")
    teach("--out", "teacher", *flags)
    distil("--out", "student", *TRUSTED, "--epochs", "1", *flags)
    data = load_data(DataConfig("synthetic"))
    assert len(data.train.labels) % 50 == 0
    network = load_network(Path("teacher"), trust_code=True).network
    mean, std = (torch.tensor(part)[:, None, None] for part in (data.mean, data.std))
    with torch.no_grad():
        logits = network((data.train.images / 255 - mean) / std)
    (line,) = metrics_of(Path("student"))
    correct = (logits.argmax(dim=1) == data.train.labels).double().mean().item()
    assert line["train/teacher_top1"] == pytest.approx(100 * correct)
    assert line["train/teacher_entropy"] == pytest.approx(entropy(logits.softmax(dim=1), axis=1).mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"soft_entropy": 0.02}, "soft labels are nearly the hard labels"),
        ({"gradient_ratio": 250.0}, "drowns cross-entropy: its gradient is 250 times"),
        ({"gradient_ratio": 0.001}, "cross-entropy drowns the distillation term"),
        ({"soft_entropy": 0.06, "gradient_ratio": 50.0}, ""),
    ],
)
def test_what_is_worth_a_warning_and_that_it_is_said_once(numbers, words):
    line = {f"train/{name}": value for name, value in numbers.items()}
    said = warnings([{}, line], classes=100)
    assert len(said) == bool(words)
    assert words in "".join(said)
    assert warnings([line, {}, line], classes=100) == []


def test_a_teacher_without_doubt_is_warned_of(capsys):
    """As a user meets it: a temperature so low that the labels are hard."""
    teach("--out", "teacher")
    distil("--out", "student", *TRUSTED, "kd", "--temperature", "0.001")
    out = capsys.readouterr().out
    assert out.count("warning: kd tests.networks:normalised: the teacher's soft labels are nearly the hard labels") == 1
    entropy_there = json.loads(Path("student/metrics.jsonl").read_text().splitlines()[0])["train/soft_entropy"]
    assert entropy_there < 0.01 * math.log(10)
