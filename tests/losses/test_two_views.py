"""Methods with two views: what each network sees, and what the student learns from."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from kd.config import METHODS
from kd.losses import loss_class
from kd.losses.base import Distiller
from kd.teachers.live import live_logits
from kd.types import Batch, Outputs, Pair
from tests.pairs import batch_of, build

INDEX = torch.arange(12)
TWO_VIEWS = [name for name, kind in METHODS.items() if kind.two_views]


@pytest.mark.parametrize("method", METHODS)
def test_each_network_runs_once_for_each_view(method):
    """No second pass for a method with one view."""
    distiller, teacher = build(method)
    calls: list[nn.Module] = []
    for network in (distiller.deployed, teacher.network):
        network.register_forward_hook(lambda module, inputs, output: calls.append(module))
    batch = batch_of(INDEX, method=method)
    distiller(batch, teacher.of_batch(batch))
    passes = 1 + METHODS[method].two_views
    assert calls == [teacher.network] * passes + [distiller.deployed] * passes


def test_each_view_has_batch_statistics_of_its_own_and_the_running_ones_are_of_both():
    student = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    both = Distiller(student, build("mlkd")[0].loss)
    batch = batch_of(INDEX, method="mlkd")
    batch = batch._replace(strong=10 + 3 * batch.strong)
    outputs = both.tap.of_batch(batch)
    running = student[0].running_mean.clone()
    student[0].reset_running_stats()
    torch.testing.assert_close(outputs.logits, student(batch.image))
    torch.testing.assert_close(outputs.strong, student(batch.strong))
    assert torch.equal(student[0].running_mean, running)
    assert student[0].num_batches_tracked == 2


@pytest.mark.parametrize("method", TWO_VIEWS)
@pytest.mark.parametrize("view", ["logits", "strong"])
def test_the_student_learns_from_both_views(method, view):
    distiller, teacher = build(method)
    batch = batch_of(INDEX, method=method)
    student = distiller.tap.of_batch(batch)
    answer = teacher.of_batch(batch)
    answer = answer._replace(logits=answer.logits.requires_grad_(), strong=answer.strong.requires_grad_())
    terms = distiller.loss(student, answer, batch)
    taught = sum(term for name, term in terms.items() if name != "ce")
    for loss in (terms["ce"], taught):
        (gradient,) = torch.autograd.grad(loss, getattr(student, view), retain_graph=True)
        assert (gradient != 0).any()


@pytest.mark.parametrize("method", TWO_VIEWS)
def test_cross_entropy_is_of_both_views(method):
    distiller, teacher = build(method)
    batch = batch_of(INDEX, method=method)
    student, answer = distiller.tap.of_batch(batch), teacher.of_batch(batch)
    entropies = [nn.functional.cross_entropy(logits, batch.label) for logits in (student.logits, student.strong)]
    weight = {"mlkd": 0.1}.get(method, 1.0)
    torch.testing.assert_close(distiller.loss(student, answer, batch)["ce"], weight * sum(entropies))


def test_a_live_teacher_answers_in_float32_for_both_views_without_gradients():
    network = build("mlkd")[1].network
    query = live_logits(network, Accelerator(cpu=True, mixed_precision="bf16"))
    batch = batch_of(INDEX, method="mlkd")
    answer = query(batch)
    assert answer.logits.dtype == answer.strong.dtype == torch.float32
    assert not answer.strong.requires_grad
    torch.testing.assert_close(answer.strong, network(batch.strong), rtol=0.1, atol=0.05)
    assert query(batch._replace(strong=None)).strong is None


CASES = json.loads((Path(__file__).parent / "reference_logits.json").read_text())["cases"]


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """16 KL(teacher || student) of one sample at T = 4, class by class."""
    p, q = (torch.exp(logits / 4) / torch.exp(logits / 4).sum() for logits in (teacher, student))
    return 16 * sum(float(p[c] * (p[c] / q[c]).log()) for c in range(len(p)))


def crld_sample_by_sample(case: dict[str, torch.Tensor]) -> float:
    """The authors' default weights and thresholds."""
    views = ("student_logits", "student_logits_strong", "teacher_logits", "teacher_logits_strong")
    total = 0.0
    for weak, strong, answer, strong_answer, label in zip(*(case[view] for view in views), case["labels"].long()):
        total -= float(weak.log_softmax(0)[label] + strong.log_softmax(0)[label])
        if answer.softmax(0).max() >= 0.9:
            total += 2 * (divergence(weak, answer) + divergence(strong, strong_answer))
        if strong_answer.softmax(0).max() >= 0.2:
            total += 0.5 * (divergence(strong, answer) + divergence(weak, strong_answer))
    return total / len(case["labels"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
@pytest.mark.parametrize("method", TWO_VIEWS)
def test_the_whole_loss_is_the_authors_by_default(case, method):
    inputs = {key: torch.tensor(value, dtype=torch.double) for key, value in case["inputs"].items()}
    inputs |= {key: 2 * inputs[key] for key in ("teacher_logits",) if method == "crld"}  # sure of some samples
    student, teacher = (
        Outputs(inputs[f"{who}_logits"], strong=inputs[f"{who}_logits_strong"]) for who in ("student", "teacher")
    )
    labels, config = inputs["labels"].long(), METHODS[method]()
    batch = Batch(torch.zeros(len(labels), 3, 8, 8), labels, torch.arange(len(labels)), *[torch.tensor(0)] * 3)
    value = sum(loss_class(config)(config, Pair(student, teacher))(student, teacher, batch).values())
    expected = case["losses"]["mlkd_total"]["value"] if method == "mlkd" else crld_sample_by_sample(inputs)
    assert value.item() == pytest.approx(expected, rel=1e-6)
