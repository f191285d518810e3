"""Means against numpy, calibration against torchmetrics."""

import numpy as np
import pytest
import torch

import kd.models  # noqa: F401  makes torchvision importable, which torchmetrics imports
from kd import metrics
from kd.metrics import class_recall
from kd.report import plots
from kd.report.groups import mean_and_deviation


def test_mean_and_deviation_agree_with_numpy():
    values = [92.11, 93.5, 91.87, 92.4]
    assert mean_and_deviation(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert mean_and_deviation([3.0]) == (3.0, None)


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (500,), generator=generator)
    logits = 2 * torch.randn(500, 10, generator=generator)
    logits[torch.arange(500), labels] += 1.5
    return logits, labels


@pytest.mark.filterwarnings("ignore")  # torchmetrics' own, at import
def test_calibration_agrees_with_torchmetrics(scored):
    from torchmetrics.functional.classification import multiclass_calibration_error

    theirs = multiclass_calibration_error(scored[0].softmax(1), scored[1], 10, n_bins=15, norm="l1")
    assert metrics.ece(*scored) == pytest.approx(100 * theirs.item(), rel=1e-5)


def test_the_reliability_diagram_shows_what_ece_sums(scored):
    points = plots.reliability(*scored)
    assert sum(count for _, _, count in points) == 500
    gap = sum(count * abs(accuracy - confidence) for confidence, accuracy, count in points) / 500
    assert metrics.ece(*scored) == pytest.approx(100 * gap)


def test_the_accuracy_of_classes_adds_up(scored):
    each = class_recall(*scored)
    counts = torch.bincount(scored[1], minlength=10)
    assert (each * counts).sum().item() / 500 == pytest.approx(metrics.top_k(*scored, 1))
