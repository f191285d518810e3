"""The newer losses of logits: their authors' values, naive loops, and what each of them must not do silently."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from kd import losses
from kd.config import METHODS
from kd.errors import UserError
from kd.losses import LearnedTemperature, kd_loss, loss_class, standardize
from tests import naive, pairs
from tests.conftest import ROOT
from tests.training.test_trainer import NoWaiting

REFERENCE = json.loads((Path(__file__).parent / "reference_logits.json").read_text())
CASES = REFERENCE["cases"]
STUDENT, STRONG = "student_logits", "student_logits_strong"
VIEWS = (STUDENT, STRONG, "teacher_logits", "teacher_logits_strong")
INDEX = torch.arange(12)
NEW = ("nkd", "wttm", "rld", "pld", "skd", "ctkd")


def rld(student: Tensor, teacher: Tensor, labels: Tensor, standardize: bool = False, **params) -> Tensor:
    if standardize:
        student, teacher = losses.standardize(student), losses.standardize(teacher)
    return losses.rld_loss(student, teacher, labels, **params)


def ctkd(student: Tensor, teacher: Tensor, theta: Tensor, epoch: int) -> Tensor:
    temperature = functional_call(LearnedTemperature(1.0, 21.0, 10.0), {"theta": theta}, torch.tensor(epoch - 1))
    return kd_loss(student, teacher, temperature)


def mlkd(name: str, inputs: dict[str, Tensor], temperatures: list[float], ce_weight: float, kd_weight: float) -> Tensor:
    terms = losses.mlkd_loss(*(inputs[view] for view in VIEWS), tuple(map(float, temperatures)))
    kept = {"mlkd_kd": ["instance"], "mlkd_bc": ["batch"], "mlkd_cc": ["class"]}.get(name, terms)
    value = kd_weight * sum(terms[term] for term in kept)
    if name == "mlkd_total":
        value += ce_weight * sum(F.cross_entropy(inputs[view], inputs["labels"].long()) for view in VIEWS[:2])
    return value


def value_of(name: str, inputs: dict[str, Tensor], params: dict) -> Tensor:
    """By the function that is exported for the entry `name`."""
    student, teacher, labels = inputs[STUDENT], inputs["teacher_logits"], inputs["labels"].long()
    method, _, rest = name.partition("_")
    functions = {
        "nkd": lambda: losses.nkd_loss(student, teacher, labels, **params),
        "wttm": lambda: losses.wttm_loss(student, teacher, **params),
        "ttm": lambda: losses.wttm_loss(student, teacher, **params, weighted=False),
        "rld": lambda: rld(student, teacher, labels, **params),
        "pld": lambda: losses.pld_loss(student, teacher, labels, **params),
        "skd": lambda: losses.skd_loss(student, teacher, **params),
        "ctkd": lambda: ctkd(student, teacher, inputs["theta"], **params),
        "crld": lambda: losses.crld_loss(*(inputs[view] for view in VIEWS), **params)[rest],
        "mlkd": lambda: mlkd(name, inputs, **params),
        "mlkd_instance_T4": lambda: kd_loss(student, teacher, **params),
        "mlkd_batch_T4": lambda: losses.batch_relation_loss(student, teacher, **params),
        "mlkd_class_T4": lambda: losses.class_relation_loss(student, teacher, **params),
    }
    return functions.get(name, functions[method])()


def tensors_of(case: dict) -> dict[str, Tensor]:
    inputs = {key: torch.tensor(value, dtype=torch.double) for key, value in case["inputs"].items()}
    return inputs | {"theta": torch.ones((), dtype=torch.double)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
@pytest.mark.parametrize("name", CASES[0]["losses"])
def test_agrees_with_public_code_in_value_and_gradients(case, name):
    entry, inputs = case["losses"][name], tensors_of(case)
    gradients = {STUDENT: entry["gradient"], **entry.get("gradients", {})}
    for key in gradients:
        inputs[key].requires_grad_()
    value = value_of(name, inputs, entry["params"])
    value.backward()
    assert value.item() == pytest.approx(entry["value"], rel=1e-6)
    for key, expected in gradients.items():
        torch.testing.assert_close(inputs[key].grad, torch.tensor(expected, dtype=torch.double), rtol=1e-6, atol=1e-9)


def test_mlkd_as_in_the_paper_masks_samples_and_columns_and_compares_strong_with_strong():
    views = [tensors_of(CASES[0])[view] for view in VIEWS]
    terms = losses.mlkd_loss(*views, (2.0, 3.0), as_in_paper=True)
    expected = naive.mlkd(*views, (2.0, 3.0))
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-9)
    as_coded = losses.mlkd_loss(*views, (2.0, 3.0))
    assert all(not math.isclose(terms[name].item(), as_coded[name].item()) for name in terms)


def test_mlkds_masks_keep_the_median_of_an_odd_number():
    """3 of 5 samples, 4 of 7 classes."""
    student, student_strong, teacher, teacher_strong = views = torch.randn(4, 5, 7).double()
    terms = losses.mlkd_loss(*views, (4.0,))
    kd, kd_strong = kd_loss(student, teacher, 4.0), kd_loss(student_strong, teacher_strong, 4.0)
    torch.testing.assert_close(terms["instance"], kd * 3 / 5 + kd_strong)
    torch.testing.assert_close(terms["batch"], losses.batch_relation_loss(student, teacher, 4.0) * 3 / 5)
    torch.testing.assert_close(terms["class"], losses.class_relation_loss(student, teacher, 4.0) * 4 / 7)
    in_paper = losses.mlkd_loss(*views, (4.0,), as_in_paper=True)
    assert {name: term.item() for name, term in in_paper.items()} == pytest.approx(naive.mlkd(*views, (4.0,)), rel=1e-9)


@pytest.mark.parametrize("paper", [False, True])
def test_mlkd_of_equal_networks_is_zero_and_of_distant_ones_finite(paper):
    weak, strong = torch.randn(2, 6, 7)
    terms = losses.mlkd_loss(weak, strong, weak.clone(), strong.clone(), as_in_paper=paper)
    assert all(term.item() == pytest.approx(0, abs=1e-5) for term in terms.values())
    far = [(1e4 * torch.randn(6, 7)).requires_grad_() for _ in range(2)]
    terms = losses.mlkd_loss(*far, 1e4 * weak, 1e4 * strong, as_in_paper=paper)
    sum(terms.values()).backward()
    assert all(torch.isfinite(part).all() for part in (*terms.values(), *(each.grad for each in far)))


def test_crld_counts_only_samples_that_the_teacher_is_sure_of():
    student, student_strong, teacher, teacher_strong = torch.randn(4, 6, 5).double()
    teacher[:2, 3] += 20
    terms = losses.crld_loss(student, student_strong, teacher, teacher_strong, 4.0, 0.99, 1.1)
    expected = sum(
        kd_loss(*pair, 4.0) for pair in ((student[:2], teacher[:2]), (student_strong[:2], teacher_strong[:2]))
    )
    torch.testing.assert_close(terms["within"], expected * 2 / 6)
    assert terms["across"] == 0
    every = losses.crld_loss(student, student_strong, teacher, teacher_strong, 4.0, 0.0, 0.0)
    torch.testing.assert_close(
        every["across"], kd_loss(student_strong, teacher, 4.0) + kd_loss(student, teacher_strong, 4.0)
    )


@pytest.mark.parametrize("method", ["nkd", "rld", "pld"])
def test_methods_that_want_one_label_refuse_mixed_images(method):
    assert loss_class(METHODS[method]).needs_hard_labels


def test_two_classes_leave_the_labels_terms():
    """There is one other class, so nothing to compare between others."""
    student, teacher, labels = torch.randn(5, 2), torch.randn(5, 2), torch.arange(5) % 2
    right = teacher.scatter(1, labels[:, None], 9.0)
    torch.testing.assert_close(losses.rld_loss(student, right, labels, 1.0, 8.0, 4.0), kd_loss(student, right, 1.0))
    torch.testing.assert_close(
        losses.nkd_loss(student, teacher, labels, 9.0, 4.0), losses.nkd_loss(student, teacher, labels, 0.0, 1.0)
    )
    weights = (teacher / 4).softmax(1).gather(1, labels[:, None])[:, 0]
    expected = (weights * F.cross_entropy(student, labels, reduction="none")).mean()
    torch.testing.assert_close(losses.pld_loss(student, teacher, labels, 4.0), expected)


def test_rld_with_nothing_below_the_label_is_the_confidences_alone():
    student = torch.randn(3, 6, requires_grad=True)
    teacher, labels = torch.randn(3, 6), torch.tensor([2, 0, 5])
    teacher.scatter_(1, labels[:, None], -20.0)
    with torch.autograd.set_detect_anomaly(True):  # raises for NaN on the way, too
        value = losses.rld_loss(student, teacher, labels, 1.0, 8.0, 4.0)
        value.backward()
    assert value.item() == losses.rld_loss(student, teacher, labels, 1.0, 0.0, 4.0).item()
    assert torch.isfinite(student.grad).all()


def test_rld_of_a_right_teacher_is_dkd():
    """If the label is the teacher's largest, the two-class distributions and the other classes are dkd's."""
    student, teacher, labels = torch.randn(5, 7).double(), torch.randn(5, 7).double(), torch.arange(5)
    teacher.scatter_(1, labels[:, None], 5.0)
    ours = losses.rld_loss(student, teacher, labels, 2.0, 8.0, 4.0, binary_temperature=4.0)
    torch.testing.assert_close(ours, losses.dkd_loss(student, teacher, labels, 2.0, 8.0, 4.0))


def test_wttm_at_exponent_1_is_kd_at_temperature_1():
    student, teacher = torch.randn(2, 5, 7).double()
    for weighted in (False, True):
        torch.testing.assert_close(losses.wttm_loss(student, teacher, 1.0, weighted), kd_loss(student, teacher, 1.0))


@pytest.mark.parametrize(
    ("flags", "weight"), [({}, 2.25), ({"unweighted": True}, 45.0), ({"unweighted": True, "weight": 7.0}, 7.0)]
)
def test_wttm_and_ttm_have_their_own_default_weights(flags, weight):
    distiller, teacher = pairs.build("wttm", **flags)
    batch = pairs.batch_of(INDEX)
    expected = losses.wttm_loss(distiller.student(batch.image), teacher(batch.image).logits, 0.1, not flags)
    torch.testing.assert_close(pairs.terms_of(distiller, teacher, batch)["wttm"], weight * expected)


def test_pld_ranks_the_label_first_and_then_the_teachers_order():
    student, teacher = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    labels = torch.tensor([0, 5, 2, 2])
    order = [
        [label, *(c for c in row if c != label)]
        for label, row in zip(labels.tolist(), teacher.argsort(1).flip(1).tolist())
    ]
    good = torch.stack(
        [torch.zeros(6).double().scatter(0, torch.tensor(row), torch.arange(6, 0, -1).double()) for row in order]
    )
    value = losses.pld_loss(20 * good, teacher, labels, 1.0)
    assert value < 1e-6
    assert losses.pld_loss(20 * good.flip(1), teacher, labels, 1.0) > 1
    torch.testing.assert_close(
        losses.pld_loss(student + 3, teacher, labels, 1.0), losses.pld_loss(student, teacher, labels, 1.0)
    )


def test_skd_sees_directions_only():
    student, teacher = torch.randn(2, 5, 7).double()
    value = losses.skd_loss(student, teacher)
    torch.testing.assert_close(losses.skd_loss(3 * student, 0.1 * teacher), value)
    assert value > 0
    assert torch.isfinite(losses.skd_loss(student[:1], teacher[:1])), "one sample has no covariance"


def test_skds_weights_can_be_the_authors():
    """Their code: 0.1 * CE + 0.9 * half * T^2 KL + 0.9 * half * direction, half being the masks' share."""
    distiller, teacher = pairs.build("skd", ce_weight=0.1, kd_weight=7.2, direction_weight=0.45)
    batch = pairs.batch_of(INDEX)
    student, target = distiller.student(batch.image), teacher(batch.image).logits
    terms = pairs.terms_of(distiller, teacher, batch)
    torch.testing.assert_close(terms["ce"], 0.1 * F.cross_entropy(student, batch.label))
    torch.testing.assert_close(terms["kd"], 0.9 * 0.5 * kd_loss(student, target, 4.0))
    torch.testing.assert_close(terms["skd"], 0.9 * 0.5 * losses.skd_loss(student, target))


def test_a_reversed_gradient_changes_no_value():
    value = torch.tensor(0.3, requires_grad=True)
    reversed_ = losses.reverse_gradient(value, torch.tensor(0.25))
    reversed_.backward()
    assert reversed_.item() == value.item()
    assert value.grad.item() == -0.25


def test_ctkds_temperature_is_trained_against_the_student_more_and_more():
    distiller, teacher = pairs.build("ctkd", decay_epochs=4.0)
    theta = distiller.loss.temperature.theta
    assert "loss.temperature.theta" in distiller.state_dict()
    assert any(parameter is theta for parameter in distiller.parameters())
    found = []
    for epoch in (0, 1, 3, 7):
        sum(pairs.terms_of(distiller, teacher, pairs.batch_of(INDEX, epoch)).values()).backward()
        found.append(theta.grad.item())
        theta.grad = None
    loss = lambda value: kd_loss(student, target, 1 + 20 * torch.sigmoid(value))  # noqa: E731
    batch = pairs.batch_of(INDEX)
    student, target = distiller.student(batch.image).detach(), teacher(batch.image).logits
    whole = torch.func.grad(loss)(torch.ones(())).item() * 0.9
    expected = [-(1 - math.cos(math.pi * share)) / 2 * whole for share in (0.25, 0.5, 1, 1)]
    assert found == pytest.approx(expected, rel=5e-3)  # T^2 and the divergence nearly cancel


def test_ctkd_reports_the_entropy_at_its_temperature():
    distiller, teacher = pairs.build("ctkd")
    outputs = teacher(pairs.batch_of(INDEX).image)
    temperature = 1 + 20 / (1 + math.exp(-1))
    torch.testing.assert_close(distiller.loss.soft_labels(outputs), outputs.logits / temperature)
    distiller.loss.temperature.theta.data.fill_(-50.0)
    torch.testing.assert_close(distiller.loss.soft_labels(outputs), outputs.logits)


@pytest.mark.parametrize(
    ("method", "flags", "words"),
    [
        ("ctkd", {"lowest_temperature": 21.0}, "--lowest-temperature 21.0: give less than --highest-temperature 21.0"),
        ("wttm", {"exponent": 0.0}, "--exponent 0.0: give a number above 0"),
        ("wttm", {"weight": -1.0}, "--weight -1.0: give 0 or more"),
        ("skd", {"ridge": 0.0}, "--ridge 0.0: give a number above 0"),
        ("pld", {"temperature": 0.0}, "--temperature 0.0: give a number above 0"),
        ("nkd", {"gamma": -1.0}, "--gamma -1.0: give 0 or more"),
        ("rld", {"binary_temperature": 0.0}, "--binary-temperature 0.0: give a number above 0"),
    ],
)
def test_a_value_out_of_range_is_refused(method, flags, words):
    with pytest.raises(UserError, match=words):
        pairs.build(method, **flags)


@pytest.mark.parametrize("method", ["rld", "skd", "ctkd"])
def test_standardised_logits_are_compared(method):
    distiller, teacher = pairs.build(method, standardize=True)
    plain, _ = pairs.build(method)
    batch = pairs.batch_of(INDEX)
    outputs = teacher(batch.image)
    terms = plain.loss(
        *(part._replace(logits=standardize(part.logits)) for part in (distiller.tap(batch.image), outputs)), batch
    )
    torch.testing.assert_close(distiller(batch, outputs).terms[method], terms[method])


@pytest.mark.parametrize("method", NEW)
def test_a_step_makes_the_host_wait_for_nothing(method):
    """cholesky asks for its error, which on a GPU waits; cholesky_ex does not."""
    distiller, teacher = pairs.build(method)
    batch = pairs.batch_of(INDEX)
    outputs = teacher(batch.image)
    watch = NoWaiting()
    watch.waits = (*NoWaiting.waits, torch.ops.aten._linalg_check_errors.default, torch.ops.aten.masked_select.default)
    with watch:
        step = distiller(batch, outputs)
        sum(step.terms.values()).backward()
    assert watch.count == 0


COMPILED = """
import torch, torch._dynamo.testing
from tests import pairs
for method in ("nkd", "wttm", "rld", "pld", "ctkd"):  # skd breaks the graph: it gathers over the processes
    torch._dynamo.reset()
    distiller, teacher = pairs.build(method)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(distiller, backend=counter, fullgraph=True)
    for epoch in (0, 1, 30):
        batch = pairs.batch_of(torch.arange(12), epoch)._replace(view=torch.tensor(epoch))
        outputs = teacher(batch.image)
        terms = compiled(batch, outputs).terms
        torch.testing.assert_close(terms, distiller(batch, outputs).terms)
    assert counter.frame_count == 1, (method, counter.frame_count)
"""


@pytest.mark.slow
def test_a_compiled_step_is_compiled_once_for_all_epochs():
    """In a process of its own: torch.compile cannot trace the shape checks of the tests."""
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
