"""Imbalanced classes: long-tailed subsets, the balanced sampler, weighted cross-entropy, accuracy of rare classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd.config import DataConfig
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.data import Split, load_data
from kd.data.cache import Arrays
from kd.data.loader import balanced_order, epoch_order
from kd.data.splits import long_tail
from kd.errors import UserError
from kd.losses.cross_entropy import class_weights, cross_entropy, log_prior
from kd.metrics import rare_class_scores, shot_groups
from kd.report.groups import by_data
from kd.report.tables import rare_table
from kd.runs.results import collect_runs
from kd.types import Batch, Mix
from kd.utils import rng
from tests.pairs import LABELS, batch_of, build, terms_of
from tests.run_scripts import SMALL, differences, distil, metrics_of, script, teach, torchrun
from tests.training.test_resume import Killed, die_at

CPU = {"ACCELERATE_USE_CPU": "true"}
COUNTS = torch.tensor([450, 120, 30, 5])


def numbered(classes: int, each: int) -> Arrays:
    """A balanced set whose images encode their row numbers."""
    labels = np.arange(classes * each) % classes
    images = np.zeros((len(labels), 3, 2, 2), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(len(labels)) % 256, np.arange(len(labels)) // 256
    return Arrays(images, labels)


def rows_of(split: Arrays) -> set[int]:
    return set((split.images[:, 0, 0, 0].astype(int) + 256 * split.images[:, 0, 0, 1].astype(int)).tolist())


def test_the_profile_is_the_published_one():
    kept = np.bincount(long_tail(numbered(100, 500), 0.01, 100, seed=0).labels)
    assert (kept[0], kept[-1], kept.sum()) == (500, 5, 10847), "CIFAR-100-LT of ratio 100 has 10,847 images"
    ten = np.bincount(long_tail(numbered(10, 5000), 0.01, 10, seed=0).labels)
    assert ten.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50], "CIFAR-10-LT of ratio 100"


def test_kept_rows_depend_on_the_split_seed_alone_and_ratios_nest():
    balanced = numbered(4, 60)
    large, small = (rows_of(long_tail(balanced, ratio, 4, seed=3)) for ratio in (0.5, 0.1))
    assert small < large
    assert large == rows_of(long_tail(balanced, 0.5, 4, seed=3)) != rows_of(long_tail(balanced, 0.5, 4, seed=4))
    with pytest.raises(UserError, match=r"differ in size already \(6 to 60 images\)"):
        long_tail(long_tail(balanced, 0.1, 4, seed=0), 0.5, 4, seed=0)
    with pytest.raises(UserError, match="--imbalance 0"):
        DataConfig("synthetic", imbalance=0.0).check()


def test_imbalance_leaves_validation_and_test_unchanged():
    whole, tailed = (load_data(DataConfig("synthetic", imbalance=ratio)) for ratio in (1.0, 0.1))
    assert len(tailed.train.labels) < len(whole.train.labels)
    for name in ("val", "test"):
        assert getattr(whole, name).sha256 == getattr(tailed, name).sha256, name


def test_the_sampler_draws_classes_and_their_images_equally_often():
    labels = torch.arange(4).repeat_interleave(COUNTS)[torch.randperm(605, generator=torch.manual_seed(0))]
    drawn = torch.zeros(605)
    for epoch in range(8):
        order = balanced_order(7, epoch, labels)
        assert len(order) == 605
        each = torch.bincount(labels[order])
        assert each.max() - each.min() <= 1
        times = torch.bincount(order, minlength=605)
        for label in range(4):  # no image repeats before all others of its class
            assert times[labels == label].max() - times[labels == label].min() <= 1
        drawn += times
    assert (drawn[labels == 0] > 0).float().mean() > 0.8, "each epoch draws another part of a large class"
    assert torch.equal(balanced_order(7, 3, labels), balanced_order(7, 3, labels))
    assert not torch.equal(balanced_order(7, 3, labels), balanced_order(8, 3, labels))
    halves = [half for epoch in range(8) for half in labels[balanced_order(7, epoch, labels)].split(302)[:2]]
    assert all(torch.bincount(half, minlength=4).min() > 50 for half in halves), "classes are mixed, not in blocks"
    split = Split(torch.empty(605, 3, 1, 1, dtype=torch.uint8), labels)
    assert torch.equal(epoch_order("none", 7, 3, split), rng.order(7, 3, 605))
    assert torch.equal(epoch_order("sampler", 7, 3, split), balanced_order(7, 3, labels))


def test_weights_are_the_effective_numbers_inverse():
    effective = np.array([sum(0.9999**i for i in range(n)) for n in COUNTS.tolist()])  # the geometric series itself
    weights = class_weights(COUNTS).double().numpy()
    np.testing.assert_allclose(weights * effective, (weights * effective)[0], rtol=1e-5)
    assert (weights * COUNTS.numpy()).sum() == pytest.approx(COUNTS.sum().item(), rel=1e-5)
    torch.testing.assert_close(class_weights(torch.tensor([9, 9, 9])), torch.ones(3))
    torch.testing.assert_close(log_prior(COUNTS).exp() * COUNTS.sum(), COUNTS.float())
    assert torch.isfinite(class_weights(torch.tensor([5, 0]))).all(), "a class without images"
    assert torch.isfinite(log_prior(torch.tensor([5, 0]))).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_weighs_each_label(smoothing):
    torch.manual_seed(0)
    logits, label, other = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 0]), torch.tensor([3, 3, 0, 1, 2, 2])
    weights, share = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.rand(6)
    batch = Batch(torch.zeros(6, 3, 1, 1), label, torch.arange(6), *torch.zeros(3, dtype=torch.int64))
    each = lambda k: F.cross_entropy(logits, k, label_smoothing=smoothing, reduction="none")  # noqa: E731
    expected = sum(weights[k] * each(label)[i] for i, k in enumerate(label.tolist())) / 6
    torch.testing.assert_close(cross_entropy(logits, batch, smoothing, weights), expected)
    mixed = share * weights[label] * each(label) + (1 - share) * weights[other] * each(other)
    torch.testing.assert_close(
        cross_entropy(logits, batch._replace(mix=Mix(other, share)), smoothing, weights), mixed.mean()
    )


@pytest.mark.parametrize("method", ["kd", "dkd", "at", "tfkd", "apprentice"])
@pytest.mark.parametrize("balance", ["weights", "logit-adjust"])
def test_balance_changes_cross_entropy_and_nothing_else(method, balance):
    batch = batch_of(torch.arange(24))
    plain, teacher = build(method)
    balanced, _ = build(method, balance=balance, labels=LABELS[(LABELS == 1) | (torch.arange(40) < 20)])
    before, after = terms_of(plain, teacher, batch), terms_of(balanced, teacher, batch)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        name for name in before if name in ("teacher_ce", "ce")
    ]
    assert plain.state_dict().keys() == balanced.state_dict().keys(), "checkpoints have the same keys"


def test_logit_adjustment_is_undone_in_prediction():
    """The prior is added in the loss only, whose optimum is the balanced posterior; scores use the plain logits."""
    distiller, _ = build("none", balance="logit-adjust", labels=torch.tensor([0] * 8 + [1, 2, 3, 4]))
    batch = batch_of(torch.arange(6))
    logits, terms, _ = distiller(batch, None)
    prior = torch.tensor([8, 1, 1, 1, 1]) / 12
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits + prior.log(), batch.label))
    torch.testing.assert_close(logits, distiller.student(batch.image), msg="scored logits are not shifted")


def test_shots_by_the_papers_limits_or_by_thirds():
    of = lambda counts: {name: part.tolist() for name, part in shot_groups(torch.tensor(counts)).items()}  # noqa: E731
    assert of([101, 100, 20, 19, 5000]) == {"many": [0, 4], "medium": [1, 2], "few": [3]}
    all_many = [300, 2250, 900, 112, 500, 700]
    assert of(all_many) == {"many": [1, 2], "medium": [5, 4], "few": [0, 3]}
    assert of([40, 500]) == {"many": [1], "medium": [], "few": [0]}


def test_shot_scores_average_classes_not_images():
    logits = F.one_hot(torch.tensor([0, 0, 0, 0, 1, 0, 2, 2, 0, 3]), 4).float()
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 1, 3, 3])
    scores = rare_class_scores(logits, labels, torch.tensor([500, 50, 5, 4]))
    third = 100 / 3
    assert scores["test_top1_many"] == 100
    assert scores["test_top1_medium"] == pytest.approx(third)
    assert scores["test_top1_few"] == pytest.approx((100 + 50) / 2)
    assert scores["test_balanced_top1"] == pytest.approx((100 + third + 100 + 50) / 4)
    assert scores["shots"]["few"] == {"classes": 2, "smallest": 4, "largest": 5}


TAILED = ["--imbalance", "0.05", "--batch-size", "30"]


def test_a_run_records_images_per_class_and_accuracy_of_rare_classes():
    distil(*TAILED, "--balance", "logit-adjust", "--control", "--epochs", "1")
    (folder,) = Path("runs/report").glob("kd-*")
    record, summary = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
    each = record["data"]["images_per_class"]
    assert each == sorted(each, reverse=True)
    assert each[-1] == int(each[0] * 0.05)
    assert (record["identity"]["imbalance"], record["identity"]["balance"]) == (0.05, "logit-adjust")
    teacher = json.loads((Path(summary["teacher"]) / "config.json").read_text())
    assert teacher["data"]["images_per_class"] == each, "teacher and student learn from the same rows"
    assert teacher["identity"]["balance"] == "logit-adjust"
    assert summary["test_balanced_top1"] == pytest.approx(summary["test_top1"]), "the test set is balanced"
    (found,) = by_data(collect_runs(["runs/report"])[0]).values()
    table = rare_table(found)
    assert len(table.rows) == 3
    assert f"{summary['shots']['few']['classes']} of" in table.note


def test_without_the_flags_identity_and_summary_have_no_new_keys():
    teach("--epochs", "1", "--out", "run")
    identity = json.loads(Path("run/config.json").read_text())["identity"]
    assert not {"imbalance", "balance"} & identity.keys()
    assert "test_balanced_top1" not in json.loads(Path("run/summary.json").read_text())
    assert rare_table(next(iter(by_data(collect_runs(["run"])[0]).values()))) is None


@pytest.mark.parametrize("balance", ["sampler", "weights"])
def test_killed_and_resumed_it_ends_in_the_same_bytes(balance, monkeypatch):
    teach(*TAILED, "--balance", balance, "--out", "whole", "--epochs", "2")
    flags = [*TAILED, "--balance", balance, "--out", "run", "--epochs", "2", "--save-every", "3"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 13)
        teach(*flags)
    teach(*flags, "--resume")
    assert differences(Path("whole"), Path("run")) == []


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["sampler", "weights"])
def test_two_processes_draw_and_weigh_as_one_does(balance):
    flags = [*SMALL, "--model", "tests.networks:plain", *TAILED, "--balance", balance, "--wandb", "disabled"]
    done = script("train_teacher.py", *flags, "--out", "two", env=CPU, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    teach(*flags, "--out", "one")
    for line, other in zip(metrics_of(Path("one")), metrics_of(Path("two")), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_a_method_without_cross_entropy_refuses_balance():
    with pytest.raises(UserError, match="--balance weights: changes cross-entropy, and simkd has none"):
        distil("simkd", "--balance", "weights")


def test_a_study_hands_the_flags_to_teacher_and_students_alike():
    flags = ["--data", "synthetic", "--label", "kind", "--imbalance", "0.05", "--balance", "logit-adjust"]
    config = parse(distill_defaults, "", flags)
    for job in (config.job(), config.teacher_job(), config.control_job()):
        assert (job.data.imbalance, job.data.label, job.fit.balance) == (0.05, "kind", "logit-adjust")
