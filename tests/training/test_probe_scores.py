"""kNN and linear probe against naive loops and scikit-learn."""

import math

import pytest
import torch
import torch.nn.functional as F

from kd.training import probe_scores
from kd.training.probe_scores import (
    PENALTIES,
    Standardise,
    choose_penalty,
    fit_logistic,
    held_out,
    knn_accuracy,
    linear_probe_accuracy,
)


def clouds(rows: int, seed: int, classes: int = 5, width: int = 7, spread: float = 1.5):
    """Overlapping clouds, one a class, of features of very different scales."""
    centres = torch.randn(classes, width, generator=torch.manual_seed(0))
    generator = torch.manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    features = centres[labels] + spread * torch.randn(rows, width, generator=generator)
    return features * 10.0 ** torch.linspace(-2, 2, width) + 3, labels


TRAIN, TEST = clouds(150, 1), clouds(60, 2)


def naive_knn(features, labels, test_features, test_labels, k, temperature) -> float:
    right = 0
    for feature, wanted in zip(test_features.tolist(), test_labels.tolist(), strict=True):
        similarities = []
        for row, other in enumerate(features.tolist()):
            dot = math.fsum(one * two for one, two in zip(feature, other))
            lengths = math.hypot(*feature) * math.hypot(*other)
            similarities.append((dot / lengths, row))
        votes = {}
        for similarity, row in sorted(similarities, reverse=True)[:k]:
            label = int(labels[row])
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
        right += max(sorted(votes), key=votes.get) == wanted
    return 100 * right / len(test_labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 0.5), (149, 0.3)])
def test_knn_against_a_loop(k, temperature):
    found = knn_accuracy(*TRAIN, *TEST, k, temperature)
    assert found == pytest.approx(naive_knn(*TRAIN, *TEST, k, temperature))
    assert 20 < found < 100, "neither trivial nor hopeless"


def test_the_votes_are_weighted():
    """Two far neighbours of one class lose to one that is near; with equal votes they would win."""
    features = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]]), dim=1)
    labels, test = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(features, labels, test, torch.tensor([1]), 3, 0.07) == 100
    assert knn_accuracy(features, labels, test, torch.tensor([0]), 3, 1000.0) == 100


def test_the_length_of_features_counts_for_nothing():
    lengths = torch.linspace(0.01, 100, len(TRAIN[0]))[:, None]
    assert knn_accuracy(TRAIN[0] * lengths, TRAIN[1], *TEST) == knn_accuracy(*TRAIN, *TEST)


def test_k_is_at_most_the_rows_and_a_small_temperature_overflows_nothing():
    features, labels = TRAIN[0][:3], TRAIN[1][:3]
    assert knn_accuracy(features, labels, *TEST, 20) == knn_accuracy(features, labels, *TEST, 3)
    assert knn_accuracy(*TRAIN, *TEST, 20, 1e-4) == knn_accuracy(*TRAIN, *TEST, 1)


def test_a_class_that_only_the_test_rows_have_is_never_right():
    assert knn_accuracy(*TRAIN, TEST[0], torch.full((60,), 9)) == 0
    assert linear_probe_accuracy(*TRAIN, TEST[0], torch.full((60,), 9)) == 0


@pytest.mark.parametrize("rows", [1, 7, 59])
def test_similarities_in_parts_are_those_of_all_at_once(rows, monkeypatch):
    whole = knn_accuracy(*TRAIN, *TEST)
    monkeypatch.setattr(probe_scores, "SIMILARITIES", rows * len(TRAIN[0]))
    told = []
    assert knn_accuracy(*TRAIN, *TEST, told=lambda *words: told.append(words)) == whole
    assert told[-1] == ("kNN", 60, 60)
    assert len(told) == math.ceil(60 / rows)


def objective(weights, features, labels, penalty) -> torch.Tensor:
    logits = features @ weights[:, :-1].T + weights[:, -1]
    return F.cross_entropy(logits, labels) + penalty / 2 * (weights[:, :-1] ** 2).sum()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_fit_is_where_autograds_gradient_is_zero(penalty):
    scale = Standardise(TRAIN[0])
    weights = fit_logistic(scale(TRAIN[0]), TRAIN[1], penalty, 5).requires_grad_()
    standard = ((TRAIN[0].double() - TRAIN[0].double().mean(0)) / TRAIN[0].double().std(0, correction=0)).detach()
    objective(weights, standard, TRAIN[1], penalty).backward()
    assert weights.grad.abs().max() < 1e-5


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_fit_is_scikit_learns(penalty):
    linear_model = pytest.importorskip("sklearn.linear_model")
    standard = next(iter(Standardise(TRAIN[0])(TRAIN[0])))
    weights = fit_logistic(Standardise(TRAIN[0])(TRAIN[0]), TRAIN[1], penalty, 5)
    fitted = linear_model.LogisticRegression(C=1 / (penalty * len(TRAIN[1])), max_iter=10_000, tol=1e-9)
    fitted.fit(standard.numpy(), TRAIN[1].numpy())
    ours = weights - weights.mean(0)  # a constant added to all classes changes nothing but the bias
    torch.testing.assert_close(ours[:, :-1], torch.tensor(fitted.coef_), rtol=1e-3, atol=1e-3)
    bias = torch.tensor(fitted.intercept_)
    torch.testing.assert_close(ours[:, -1], bias - bias.mean(), rtol=1e-3, atol=1e-3)


def with_noise(features, seed: int):
    """The features among 60 that tell nothing, so that the penalty matters."""
    return torch.cat([features, torch.randn(len(features), 60, generator=torch.manual_seed(seed))], dim=1)


def test_the_whole_probe_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    features, test, labels = with_noise(TRAIN[0], 5), with_noise(TEST[0], 6), TRAIN[1]

    def fitted(rows, penalty: float):
        scale = preprocessing.StandardScaler().fit(features[rows].double().numpy())
        model = linear_model.LogisticRegression(C=1 / (penalty * int(rows.sum())), max_iter=10_000, tol=1e-9)
        model.fit(scale.transform(features[rows].double().numpy()), labels[rows].numpy())
        return lambda other: torch.tensor(model.predict_log_proba(scale.transform(other.double().numpy())))

    held, scores = held_out(labels, 0), {}
    for penalty in PENALTIES:
        log_p = fitted(~held, penalty)(features[held])
        right = (log_p.argmax(1) == labels[held]).sum().item()
        scores[penalty] = (right, -F.nll_loss(log_p, labels[held]).item())
    best = max(scores, key=scores.get)
    assert len({right for right, _ in scores.values()}) > 1, "the choice matters"
    assert choose_penalty(features, labels, held) == best
    log_p = fitted(torch.ones_like(held), best)(test)
    wanted = 100 * (log_p.argmax(1) == TEST[1]).double().mean().item()
    assert linear_probe_accuracy(features, labels, test, TEST[1]) == pytest.approx(wanted)


def test_rows_in_parts_are_those_of_all_at_once(monkeypatch):
    whole = fit_logistic(Standardise(TRAIN[0])(TRAIN[0]), TRAIN[1], 1e-3, 5)
    monkeypatch.setattr(probe_scores, "_block", lambda features: 11)
    parts = fit_logistic(Standardise(TRAIN[0])(TRAIN[0]), TRAIN[1], 1e-3, 5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_a_constant_feature_stays_zero_and_one_image_a_class_is_enough():
    features = torch.cat([TRAIN[0], torch.full((150, 1), 7.0)], dim=1)
    test = torch.cat([TEST[0], torch.full((60, 1), 9.0)], dim=1)
    assert linear_probe_accuracy(features, TRAIN[1], test, TEST[1]) > 40
    one = torch.tensor([int((TRAIN[1] == label).nonzero()[0]) for label in range(5)])
    assert not held_out(TRAIN[1][one], 0).any()
    assert linear_probe_accuracy(TRAIN[0][one], TRAIN[1][one], *TEST) > 20


def test_held_out_rows_are_a_seeded_share_of_every_class():
    held = held_out(TRAIN[1], 0)
    sizes, counts = torch.bincount(TRAIN[1]), torch.bincount(TRAIN[1][held])
    assert counts.tolist() == [round(0.2 * size) for size in sizes.tolist()]
    assert torch.equal(held, held_out(TRAIN[1], 0))
    assert not torch.equal(held, held_out(TRAIN[1], 1))
    assert held_out(torch.tensor([0, 0, 1]), 0).tolist().count(True) == 1


def test_the_probe_changes_no_random_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    linear_probe_accuracy(*TRAIN, *TEST)
    knn_accuracy(*TRAIN, *TEST)
    assert torch.equal(before, torch.get_rng_state())
