"""Scores against independent implementations, and the sums that training keeps."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

from kd import metrics
from kd.predict import most_likely
from kd.training.meter import Meter
from kd.types import Step


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (500,), generator=generator)
    logits = 2 * torch.randn(500, 10, generator=generator)
    logits[torch.arange(500), labels] += 1.5
    return logits, labels


def test_accuracies_and_likelihood_agree_with_scikit_learn(scored):
    logits, labels = scored
    probabilities = logits.double().softmax(1).numpy()
    assert metrics.top_k(logits, labels, 1) == pytest.approx(100 * accuracy_score(labels, probabilities.argmax(1)))
    assert metrics.top_k(logits, labels, 5) == pytest.approx(100 * top_k_accuracy_score(labels, probabilities, k=5))
    assert metrics.nll(logits, labels) == pytest.approx(log_loss(labels, probabilities))


def test_ece_agrees_with_a_loop_over_bins(scored):
    logits, labels = scored
    confidence, predicted = logits.double().softmax(1).max(1)
    total = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            gap = (predicted[inside] == labels[inside]).double().mean() - confidence[inside].mean()
            total += inside.double().mean().item() * abs(gap.item())
    assert metrics.ece(logits, labels) == pytest.approx(100 * total, rel=1e-9)


def test_top5_of_fewer_classes_is_complete():
    assert metrics.top_k(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), 5) == 100


def test_agreement():
    assert metrics.agreement(torch.eye(4), torch.eye(4)) == 100
    assert metrics.agreement(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]) == 50


def test_meter_weighs_by_samples_and_names_the_first_bad_step():
    accelerator = Accelerator(cpu=True)
    meter = Meter(accelerator.device)
    logits = torch.eye(4)
    for step, (loss, labels) in enumerate([(1.0, [0, 1, 2, 3]), (4.0, [0, 0])]):
        result = Step(logits[: len(labels)], {"ce": torch.tensor(loss)}, {"kl": torch.tensor(loss / 2)})
        meter.update(result, torch.tensor(labels), torch.tensor(step))
    means, bad, stop = meter.read(accelerator)
    assert means == {"train/loss": 2.0, "train/ce": 2.0, "train/kl": 1.0, "train/top1": pytest.approx(100 * 5 / 6)}
    assert (bad, stop) == (None, 0)
    for step in (2, 3):
        meter.update(
            Step(logits, {"ce": torch.tensor(torch.nan)}, {"kl": torch.tensor(0.0)}),
            torch.arange(4),
            torch.tensor(step),
        )
    assert meter.read(accelerator, stop=15)[1:] == (2, 15)


def test_meter_goes_on_after_a_restore():
    accelerator = Accelerator(cpu=True)
    one, other = Meter(accelerator.device), Meter(accelerator.device)
    result = Step(torch.eye(4), {"ce": torch.tensor(0.3), "kd": torch.tensor(0.7)}, {"kl": torch.tensor(0.1)})
    step = result, torch.arange(4), torch.tensor(0)
    one.update(*step)
    one.add_gradients(torch.tensor([3.0, 2.0]))
    other.restore(one.save(accelerator), process=0)
    one.update(*step)
    other.update(*step)
    assert one.read(accelerator) == other.read(accelerator)
    assert one.read(accelerator)[0]["train/gradient_ratio"] == 1.5


def test_meter_adds_up_many_steps_in_order_however_often_it_is_read():
    accelerator = Accelerator(cpu=True)
    often, once = Meter(accelerator.device), Meter(accelerator.device)
    losses, wanted = torch.rand(150, generator=torch.Generator().manual_seed(0)), 0.0
    for step, loss in enumerate(losses):
        wanted += loss.double().item() * 4
        for meter in (often, once):
            meter.update(Step(torch.eye(4), {"ce": loss}, {}), torch.arange(4), torch.tensor(step))
        if step % 7 == 0:
            often.read(accelerator)
    assert often.read(accelerator) == once.read(accelerator)
    assert once.sums == [wanted, 0.0, 0.0, 600.0, 600.0]


def test_rows_of_zeros_are_predicted_as_the_first_class_by_every_measure():
    logits, labels = torch.zeros(6, 10), torch.tensor([0, 9, 0, 3, 5, 0])
    assert metrics.top_k(logits, labels, 1) == metrics.class_recall(logits, labels)[0] / 2 == 50
    assert metrics.top_k(logits, labels, 5) == pytest.approx(100 * 4 / 6)  # classes 0 to 4 come first
    assert metrics.agreement(logits, torch.eye(10)[[0] * 6]) == 100
    assert [number for number, _ in most_likely(logits[0].numpy(), 3)] == [0, 1, 2]


@st.composite
def tied(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two networks' logits with many ties, and labels."""
    rows, classes = draw(st.integers(1, 8)), draw(st.integers(1, 7))
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, -math.inf, 2.5])
    matrix = st.lists(values, min_size=rows * classes, max_size=rows * classes)
    logits, others = (torch.tensor(draw(matrix)).reshape(rows, classes) for _ in range(2))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    return logits, others, torch.tensor(labels)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(tied())
def test_no_two_measures_of_one_prediction_contradict_each_other(drawn):
    logits, others, labels = drawn
    rows, classes = logits.shape
    naive = [sorted(range(classes), key=lambda k, row=row: (-row[k], k)) for row in logits.tolist()]
    top1 = metrics.top_k(logits, labels, 1)
    right = [order[0] == label for order, label in zip(naive, labels.tolist(), strict=True)]
    assert top1 == pytest.approx(100 * sum(right) / rows)
    assert metrics.ranked(logits).tolist() == naive
    for k in range(1, classes + 2):
        hits = [label in order[:k] for order, label in zip(naive, labels.tolist(), strict=True)]
        assert metrics.top_k(logits, labels, k) == pytest.approx(100 * sum(hits) / rows)
    # Two networks of different accuracy disagree at least as much.
    agreement = metrics.agreement(logits, others)
    assert abs(top1 - metrics.top_k(others, labels, 1)) <= 100 - agreement + 1e-9
    recall, counts = metrics.class_recall(logits, labels), torch.bincount(labels, minlength=classes)
    assert (recall.nan_to_num() * counts).sum().item() / rows == pytest.approx(top1)
    assert metrics.by_confidence(logits, labels)[1].tolist() == right
    for row, order in zip(logits, naive, strict=True):
        if row.max() > -math.inf:  # else it has no probabilities
            assert [number for number, _ in most_likely(row.numpy(), classes)] == order
    close = metrics.closeness(logits, others, labels, None)
    assert close["agreement"].item() == pytest.approx(agreement)
    assert close["teacher_top1"].item() == pytest.approx(metrics.top_k(others, labels, 1))
    accelerator = Accelerator(cpu=True)
    meter = Meter(accelerator.device)
    meter.update(Step(logits, {"ce": torch.tensor(0.0)}, {}), labels, torch.tensor(0))
    assert meter.read(accelerator)[0]["train/top1"] == pytest.approx(top1)


def test_classes_are_ranked_by_logit_where_probabilities_vanish():
    assert [number for number, _ in most_likely(np.float32([-2000, 0, -1000]), 3)] == [1, 2, 0]
    logits, labels = torch.tensor([[0, 1e-30]]), torch.tensor([1])  # both have probability 1/2
    assert metrics.by_confidence(logits, labels)[1].tolist() == [1]
    assert metrics.top_k(logits, labels, 1) == 100
