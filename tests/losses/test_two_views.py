"""Methods with two views: what each network sees, and what the student learns from."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from kd.config import METHODS
from kd.losses.base import Distiller
from kd.teachers.live import live_logits
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
def test_the_student_learns_from_both_views_and_the_teacher_from_none(method, view):
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
