"""Means, intervals and verdicts against scipy, calibration against torchmetrics."""

import numpy as np
import pytest
import torch
from scipy import stats

import kd.models  # noqa: F401  makes torchvision importable, which torchmetrics imports
from kd import metrics
from kd.metrics import class_recall, images_noise
from kd.report import plots
from kd.report.statistics import mean_and_deviation, paired


def test_mean_and_deviation_agree_with_numpy():
    values = [92.11, 93.5, 91.87, 92.4]
    assert mean_and_deviation(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert mean_and_deviation([3.0]) == (3.0, None)


@pytest.mark.parametrize("gains", [[0.3, -0.2, 0.5], [0.8, 0.9, 1.0], [-0.8, -0.9], [1.0, 1.1, 0.2, 0.9, 1.3]])
def test_the_paired_interval_agrees_with_scipy(gains):
    found = paired(dict(enumerate(gains)), noise=1.0)
    low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    expected = "smaller than the seeds' noise"
    if low > 0 or high < 0:
        expected = f"{'helped' if low > 0 else 'hurt'}, beyond the seeds' noise"
    assert found.words == expected
    assert found.interval == f"{low:+.2f} to {high:+.2f}"


@pytest.mark.parametrize(("gain", "place"), [(0.4, "within"), (3.0, "beyond")])
def test_one_seed_says_nothing_about_seeds(gain, place):
    found = paired({7: gain}, noise=1.0)
    assert found.words == f"one seed says nothing about the seeds' noise; {place} the test set's own noise of ±1.00"
    assert (found.half, found.interval, found.seeds) == (None, "", [7])


def test_equal_differences_are_no_certainty():
    assert "hides the seeds' noise; within the test set's own" in paired({0: 0.25, 1: 0.25}, noise=1.0).words
    assert paired({0: 0.0, 1: 0.0}, noise=1.0).words == "smaller than the seeds' noise"


def test_the_test_sets_noise_is_the_binomials():
    deviation = np.hypot(*(stats.binom(500, share).std() / 5 for share in (0.9, 0.8)))
    assert images_noise(90.0, 80.0, 500) == pytest.approx(1.96 * deviation)


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
