"""Verdicts: intervals and p-values against scipy, variances against a naive reference and bootstraps, Holm."""

import math
import random

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from kd.metrics import top_k
from kd.runs.comparison import (
    Answers,
    Difference,
    Result,
    compare,
    holm,
    variances_by_accuracy,
    variances_by_image,
)
from kd.utils.files import write_weights
from tests import verdict_simulation as simulation


def gains_of(seeds: int, images: int, seed: int = 0) -> torch.Tensor:
    """Of networks that agree on most images, with noise of seeds and of images that is larger than chance."""
    rng = np.random.default_rng(seed)
    method, control = simulation.draw(rng, simulation.NETWORKS[2], (2, seeds, images), 0.2)
    return torch.from_numpy(method.astype(float) - control)


@pytest.mark.parametrize("gains", [[0.3, -0.2, 0.5], [0.8, 0.9, 1.0], [-0.8, -0.9], [1.0, 1.1, 0.2, 0.9, 1.3]])
def test_without_the_images_noise_it_is_scipys_t_test(gains):
    theirs = stats.ttest_1samp(gains, 0)
    low, high = theirs.confidence_interval(0.95)
    found = Difference(list(range(len(gains))), np.mean(gains), np.var(gains, ddof=1) / len(gains), 0.0)
    assert (found.mean - found.half(), found.mean + found.half()) == pytest.approx((low, high))
    assert found.interval == f"{low:+.2f} to {high:+.2f}"
    assert found.p == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("gain", [0.4, -3.0])
def test_with_one_seed_it_is_scipys_normal_test_of_the_images(gain):
    found = Difference([7], gain, None, 1.5**2)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(gain) / 1.5))
    assert found.half() == pytest.approx(stats.norm.ppf(0.975) * 1.5)
    place = "within" if gain == 0.4 else "beyond"
    assert found.verdict() == f"one seed says nothing about the seeds' noise; {place} the test images' noise of ±2.94"
    assert (found.interval, found.seeds) == ("", [7])


@pytest.mark.parametrize(("seeds", "mean"), [(2, 30.0), (3, -4.1), (5, 2.0), (5, 0.0)])
def test_with_both_it_is_the_error_at_which_scipys_interval_ends_at_0(seeds, mean):
    found = Difference(list(range(seeds)), mean, 0.7, 0.3)

    def half(error: float) -> float:
        return math.hypot(stats.t.isf(error / 2, seeds - 1) * 0.7**0.5, stats.norm.isf(error / 2) * 0.3**0.5)

    expected = optimize.brentq(lambda error: half(error) - abs(mean), 1e-12, 1)
    assert found.p == pytest.approx(expected, rel=1e-6)
    assert found.half() == pytest.approx(half(0.05))
    says = "smaller than the noise of seeds and test images"
    if expected < 0.05:
        says = f"{'helped' if mean > 0 else 'hurt'}, beyond the noise of seeds and test images"
    assert found.verdict() == says
    assert (found.p < 0.05) == (abs(mean) > found.half()), "word and interval never contradict each other"


def naive_variances(gains: list[list[float]]) -> tuple[float, float]:
    """Of two or more seeds, in loops."""
    seeds, images = len(gains), len(gains[0])
    row = [sum(gain) / images for gain in gains]
    column = [sum(gain[i] for gain in gains) / seeds for i in range(images)]
    mean = sum(row) / seeds
    between_seeds = sum((value - mean) ** 2 for value in row) / (seeds - 1)
    between_images = sum((value - mean) ** 2 for value in column) / (images - 1)
    rest = sum((gains[s][i] - row[s] - column[i] + mean) ** 2 for s in range(seeds) for i in range(images))
    rest /= (seeds - 1) * (images - 1)
    of_images = max(0, between_images - rest / seeds) / images + 2 / images**2
    return 1e4 * max(between_seeds, rest / images) / seeds, 1e4 * of_images


@pytest.mark.parametrize(("seeds", "images"), [(2, 10), (3, 57), (5, 200)])
def test_the_variances_are_the_naive_ones(seeds, images):
    gains = gains_of(seeds, images)
    assert variances_by_image(gains) == pytest.approx(naive_variances(gains.tolist()))


def test_one_seeds_variance_is_that_of_two_images_more():
    gains = gains_of(1, 500)
    more = torch.cat([gains[0], torch.tensor([1.0, -1.0])])
    of_seeds, of_images = variances_by_image(gains)
    assert of_seeds is None
    assert of_images == pytest.approx(1e4 * more.var().item() / 502, rel=0.01)


def test_both_parts_together_are_the_variance_of_the_mean():
    """Over draws of seeds and images, nothing counted twice; by accuracies alone it is more."""
    kind, shape = simulation.NETWORKS[2], (2, 3, 400)
    rng, means, ours, bound = np.random.default_rng(0), [], [], []
    for _ in range(1500):
        by_image, by_accuracy = simulation.differences(*simulation.draw(rng, kind, shape, 0.05))
        means.append(by_image.mean)
        ours.append(by_image.of_seeds + by_image.of_images)
        bound.append((by_accuracy.of_seeds or 0) + by_accuracy.of_images)
    assert np.mean(ours) == pytest.approx(np.var(means), rel=0.12)
    assert np.mean(bound) > 1.2 * np.var(means)


def test_seeds_that_agree_by_chance_are_no_certainty():
    """Two seeds win as many images, but others: the images explain a spread that did not show."""
    gains = torch.zeros(2, 400)
    gains[0, :8] = gains[1, 8:16] = 1
    of_seeds, _ = variances_by_image(gains.double())
    assert of_seeds == pytest.approx(1e4 * (7.84 / 399) / 400 / 2, rel=0.05)


def test_seeds_that_all_differ_by_the_same_have_no_verdict():
    gains = gains_of(1, 300).expand(3, -1)
    for variances in (variances_by_image(gains), variances_by_accuracy([(80.25, 70.0)] * 2, 300)):
        assert variances[0] is None
        found = Difference([0, 1], 50.0, *variances).verdict()
        assert found.startswith("every seed differs by the same, which hides the seeds' noise; beyond the test images'")


def test_the_noise_by_accuracy_is_the_binomials():
    _, variance = variances_by_accuracy([(90.0, 80.0)], 500)
    deviation = np.hypot(*(stats.binom(502, (share + 1) / 502).std() / 5.02 for share in (450, 400)))
    assert variance == pytest.approx(deviation**2)
    assert variances_by_accuracy([(100.0, 100.0)], 359)[1] > 0, "not even two perfect scores are certain"


def naive_holm(p_values: list[float]) -> list[float]:
    """Each p-value's correction by the definition: the largest of those in the order up to it."""
    ordered = sorted(p_values)
    scaled = [min(1, (len(ordered) - place) * p) for place, p in enumerate(ordered)]
    return [max(scaled[: ordered.index(p) + 1]) for p in p_values]


def test_holm():
    draw = random.Random(0)
    for size in (2, 3, 16, 32):
        p_values = [draw.random() ** 3 for _ in range(size)]
        assert holm(p_values) == pytest.approx(naive_holm(p_values))
    assert holm([0.03]) == [0.03], "a single comparison is unchanged"
    assert holm([]) == []
    assert min(holm([0.006, 0.042, 0.047] + [0.5] * 29)) == pytest.approx(0.192)


def test_holm_agrees_with_statsmodels():
    """Values of statsmodels 0.15.0, multipletests(method="holm")."""
    assert holm([0.004, 0.03, 0.012, 0.2, 0.012, 0.9]) == pytest.approx([0.024, 0.09, 0.06, 0.4, 0.06, 0.9])


def test_the_verdict_follows_the_corrected_p():
    found = Difference([0, 1, 2], 4.0, 0.5, 0.1)
    assert found.p < 0.05
    assert found.verdict() == "helped, beyond the noise of seeds and test images"
    assert found.verdict(0.049, 9) == found.verdict()
    assert found.verdict(0.3, 9) == f"no verdict: p = {found.p:.3f} alone is 0.300 among 9 comparisons"
    sure = Difference([0, 1, 2, 3, 4], 40.0, 0.5, 0.1)
    assert sure.verdict(0.2, 999) == "no verdict: p <0.001 alone is 0.200 among 999 comparisons"
    one = Difference([0], 4.0, None, 2.0)
    assert one.verdict(0.04, 9).endswith("beyond the test images' noise of ±2.77")
    assert one.verdict(0.3, 9).endswith("; no verdict: p = 0.005 alone is 0.300 among 9 comparisons")


@pytest.fixture
def runs(tmp_path) -> dict[str, Result]:
    """Two methods' runs of three seeds on 300 images, with their saved logits."""
    labels = torch.arange(300) % 4
    found = {}
    for place, name in enumerate(("method", "control")):
        for seed in range(3):
            generator = torch.Generator().manual_seed(10 * place + seed)
            logits = torch.randn(300, 4, generator=generator) + (2 - place) * torch.eye(4)[labels]
            folder = tmp_path / f"{name}{seed}"
            folder.mkdir()
            write_weights(folder / "test_logits.safetensors", {"logits": logits, "labels": labels})
            summary = {"seed": seed, "test_images": 300, "test_top1": top_k(logits, labels, 1)}
            found[folder.name] = Result(folder, summary)
    return found


def sides(runs: dict[str, Result]) -> list[list[Result]]:
    return [[run for name, run in runs.items() if name.startswith(side)] for side in ("method", "control")]


def test_saved_logits_pair_the_images(runs):
    answers = Answers()
    found = compare(*sides(runs), answers)
    right = {name: answers.correct(run).double() for name, run in runs.items()}
    gains = torch.stack([right[f"method{seed}"] - right[f"control{seed}"] for seed in range(3)])
    assert found == Difference([0, 1, 2], found.mean, *variances_by_image(gains))
    assert found.mean == pytest.approx(100 * gains.mean().item())
    assert answers.notes == []


@pytest.mark.parametrize("change", ["missing", "other labels", "other size"])
def test_without_the_logits_of_any_run_the_bound_is_used_and_said(runs, change):
    path = runs["control1"].path / "test_logits.safetensors"
    size = 200 if change == "other size" else 300
    path.unlink()
    if change != "missing":
        labels = (torch.arange(size) + 1) % 4
        write_weights(path, {"logits": torch.eye(4)[labels], "labels": labels})
        runs["control1"].summary["test_top1"] = 100.0
    answers = Answers()
    found = compare(*sides(runs), answers)
    pairs = [tuple(runs[f"{side}{seed}"].summary["test_top1"] for side in ("method", "control")) for seed in range(3)]
    assert (found.of_seeds, found.of_images) == pytest.approx(variances_by_accuracy(pairs, 300))
    assert not found.by_image
    assert [str(path.parent) in note for note in answers.notes] == [True]


def test_runs_of_one_seed_count_as_their_mean(runs):
    again = Result(runs["method0"].path, runs["method0"].summary)
    method, control = sides(runs)
    assert compare([*method, again], control, Answers()) == compare(method, control, Answers())


def test_the_noise_of_several_runs_of_a_seed_is_that_of_their_mean(runs):
    """Two runs of seed 0 that answer differently, as students of two teachers do."""
    method, control = sides(runs)
    again = Result(method[1].path, method[1].summary | {"seed": 0})
    answers = Answers()
    found = compare([method[0], again, method[2]], [control[0], control[2]], answers)
    right = {name: answers.correct(run).double() for name, run in runs.items()}
    mean = (right["method0"] + right["method1"]) / 2
    gains = torch.stack([mean - right["control0"], right["method2"] - right["control2"]])
    assert (found.seeds, found.by_image) == ([0, 2], True)
    assert found.mean == pytest.approx(100 * gains.mean().item())
    assert (found.of_seeds, found.of_images) == pytest.approx(variances_by_image(gains))


def test_seeds_apart_are_not_compared(runs):
    method, control = sides(runs)
    assert compare(method[:1], control[1:], Answers()) is None
    assert compare(method[:2], control[1:], Answers()).seeds == [1]
    control[2].summary["test_top1"] = None
    assert compare(method[2:], control, Answers()) is None


@pytest.mark.parametrize("seeds", simulation.SEEDS)
def test_equal_methods_have_a_verdict_in_at_most_5_percent(seeds):
    """A small version of `python -m tests.verdict_simulation`: 5% more are allowed for 200 draws."""
    for kind, ratio in ((simulation.NETWORKS[2], 0.0), (simulation.NETWORKS[4], 1.0)):
        found = simulation.count(kind, seeds, 359, ratio, draws=200)
        assert max(found.by_image, found.by_accuracy) <= 10
        if seeds == 1:
            assert (found.by_image, found.by_accuracy) == (0, 0), "one seed is not enough for a verdict"


def test_the_simulation_sees_what_forgetting_the_images_costs():
    assert simulation.count(simulation.NETWORKS[2], 5, 359, 0.0, draws=100).before > 15


def test_one_seeds_p_is_nearly_mcnemars():
    """Never called beyond oftener than 5%, exactly; where it says so, scipy's exact test of the pairs agrees."""
    assert max(simulation.size_of_one_seed(359, share) for share in (0.01, 0.1, 0.5)) < 5
    for differing in (3, 5, 6, 17, 60):
        lead = simulation.least_lead(differing, 359)
        exact = stats.binomtest((differing + min(lead, differing)) // 2, differing).pvalue
        assert (lead > differing) if differing < 6 else (exact < 0.06)


def test_a_true_gain_is_found():
    assert simulation.found_gains(seeds=5, images=359, times=6, draws=50) == 100


def test_many_equal_methods_have_hardly_any_verdict():
    holms, alone = simulation.count_families(16, 5, 359, 0.0, draws=60)
    assert holms <= 12
    assert alone > holms


@pytest.mark.slow
def test_the_whole_simulation():
    for seeds in simulation.SEEDS[1:]:
        found = simulation.worst(seeds, 359, draws=300)
        assert max(found.by_image, found.by_accuracy) < 8.8, "5% and three deviations of 300 draws"


def test_the_table_of_one_run_says_what_one_seed_can(runs):
    from kd.runs.table import format_verdict

    student, control = (Result(runs[name].path, runs[name].summary) for name in ("method0", "control0"))
    found = compare([student], [control], Answers())
    line = format_verdict(student, control)
    images = round(3 * found.mean)
    assert f"{found.mean:+.2f} points ({images:+d} of 300 test images), one seed; the test images' noise is ±" in line
    assert f"±{found.half():.2f}." in line
    assert found.p < 0.05
    assert "Beyond that noise" in line
    assert "helped" not in line
    (student.path / "test_logits.safetensors").unlink()
    assert "the test images' noise is at most ±" in format_verdict(student, control)
    assert "no gain or loss was shown" in format_verdict(control, control)
    assert "seeds 0 and 1 differ" in format_verdict(student, runs["control1"])
