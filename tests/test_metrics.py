"""Scores against independent implementations, and the sums that training keeps."""

import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

from kd import metrics
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
