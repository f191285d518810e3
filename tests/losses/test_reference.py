"""Losses against their authors' code, against naive loops, and against identities."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kd import losses
from kd.config import METHODS, KDConfig, NoneConfig
from kd.losses import KD, CrossEntropy, DistillationLoss, Distiller, kd_loss, loss_class
from kd.types import Batch, Outputs, Pair
from tests import pairs
from tests.networks import plain

REFERENCE = json.loads((Path(__file__).parent / "reference_losses.json").read_text())["cases"]
PAIR = Pair(Outputs(torch.zeros(2, 10)), Outputs(torch.zeros(2, 10)))
FUNCTIONS = {
    "kd": lambda student, teacher, *, temperature: kd_loss(student, teacher, temperature),
    "kd_standardized": lambda student, teacher, *, temperature, standardize: kd_loss(
        losses.standardize(student), losses.standardize(teacher), temperature
    ),
    "dkd": losses.dkd_loss,
    "dist": losses.dist_loss,
    "at": lambda student, teacher, *, power: losses.attention_transfer_loss(student, teacher),
    "sp": losses.similarity_preserving_loss,
    "nst": losses.nst_loss,
    "hint": losses.hint_loss,
    "pkt": lambda student, teacher, *, epsilon: losses.pkt_loss(student, teacher),
    "rkd": losses.rkd_loss,
    "cc_restructured": losses.neighbour_product_loss,
}


def function_of(case: str):
    return FUNCTIONS[max((name for name in FUNCTIONS if case.startswith(name)), key=len)]


def batch_of(label: torch.Tensor, image: torch.Tensor | None = None) -> Batch:
    image = torch.zeros(len(label), 3, 8, 8) if image is None else image
    return Batch(image, label, torch.arange(len(label)), *[torch.tensor(0)] * 3)


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: f"seed{case['seed']}")
@pytest.mark.parametrize("name", REFERENCE[0]["losses"])
def test_agrees_with_the_authors_code_in_value_and_gradient(case, name):
    entry = case["losses"][name]
    inputs = [torch.tensor(case["inputs"][key], dtype=torch.double) for key in entry["inputs"]]
    inputs[2:] = [labels.long() for labels in inputs[2:]]
    inputs[0].requires_grad_()
    value = function_of(name)(*inputs, **entry["params"])
    value.backward()
    assert value.item() == pytest.approx(entry["value"], rel=1e-6)
    gradient = torch.tensor(entry["gradient"], dtype=torch.double)
    torch.testing.assert_close(inputs[0].grad, gradient, rtol=1e-6, atol=1e-9)


def test_kd_loss_agrees_with_a_naive_loop():
    student, teacher, temperature = torch.randn(5, 7).double(), torch.randn(5, 7).double(), 3.0
    total = 0.0
    for z_s, z_t in zip(student, teacher):
        p, q = torch.exp(z_t / temperature), torch.exp(z_s / temperature)
        p, q = p / p.sum(), q / q.sum()
        total += sum((p[c] * (p[c].log() - q[c].log())).item() for c in range(7))
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(temperature**2 * total / 5, rel=1e-10)


def test_kd_loss_is_zero_for_equal_logits_and_blind_to_offsets():
    logits = torch.randn(4, 10)
    assert kd_loss(logits, logits, 4.0).item() == pytest.approx(0, abs=1e-6)
    assert kd_loss(logits + 3, logits, 4.0).item() == pytest.approx(0, abs=1e-5)


def test_kd_gradients_keep_their_size_over_temperatures():
    """The reason for T^2 (section 2.1): at high temperature the gradient tends to (z_s - z_t) / C, not to zero."""
    student, teacher = torch.randn(3, 10).double(), torch.randn(3, 10).double()
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    student.requires_grad_()
    kd_loss(student, teacher, 1000.0).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 10 / 3, rtol=1e-2, atol=1e-4)


def test_kd_loss_does_not_depend_on_the_batch_being_repeated():
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    twice = kd_loss(student.repeat(2, 1), teacher.repeat(2, 1), 5.0)
    torch.testing.assert_close(twice, kd_loss(student, teacher, 5.0))


def test_kd_loss_is_finite_for_huge_logits():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = kd_loss(student, torch.tensor([[-1e4, 1e4, 0.0]]), 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_kd_loss_refuses_a_teacher_of_one_class_that_would_broadcast():
    with pytest.raises(ValueError, match="differ in shape"):
        kd_loss.__wrapped__(torch.randn(4, 10), torch.randn(4, 1), 5.0)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kd_weights_its_terms_as_the_report_does(direction):
    student, teacher, label = torch.randn(6, 10), torch.randn(6, 10), torch.arange(6)
    terms = KD(KDConfig(temperature=5.0, alpha=0.7, direction=direction), PAIR)(
        Outputs(student), Outputs(teacher), batch_of(label)
    )
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    p, q = (p / 5).softmax(1), (q / 5).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(terms["kd"], 0.7 * 25 * divergence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["ce"], 0.3 * F.cross_entropy(student, label))


def test_label_smoothing_spreads_the_target():
    logits, label = torch.randn(6, 10), torch.arange(6)
    terms = CrossEntropy(NoneConfig(label_smoothing=0.1), PAIR)(Outputs(logits), None, batch_of(label))
    target = 0.9 * F.one_hot(label, 10) + 0.01
    torch.testing.assert_close(terms["ce"], -(target * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("method", [name for name, flags in METHODS.items() if loss_class(flags).has_cross_entropy])
def test_label_smoothing_changes_cross_entropy_beside_any_teacher(method):
    """The terms with the label change, those with the teacher stay."""
    index = torch.arange(6)
    (plain_distiller, tap), (smoothed, _) = pairs.build(method), pairs.build(method, label_smoothing=0.1)
    before, after = (
        pairs.terms_of(each, tap, pairs.batch_of(index, method=method)) for each in (plain_distiller, smoothed)
    )
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name in ("ce", "teacher_ce")
    }


def test_every_method_has_flags_and_a_loss():
    assert all(issubclass(loss_class(flags), DistillationLoss) for flags in METHODS.values())
    assert len({loss_class(flags) for flags in METHODS.values()}) == len(METHODS)


def test_gradients_reach_the_student_and_losses_leave_autocast():
    torch.manual_seed(0)
    student, image = plain(10), torch.randn(6, 3, 8, 8)
    teacher_logits = torch.randn(6, 10, requires_grad=True)
    distiller = Distiller(student, KD(KDConfig(), PAIR))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, terms, _ = distiller(batch_of(torch.arange(6), image), Outputs(teacher_logits))
    assert logits.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in terms.values())
    sum(terms.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.parameters())
