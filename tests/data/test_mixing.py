"""Mixup, cutmix and erasing: distributions, pixels, and purity in (seed, view, index)."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from scipy.stats import beta

from kd.config import METHODS, DataConfig, ViewConfig
from kd.config.cli import parse
from kd.config.defaults import train_defaults
from kd.data import augment, draws, load_data
from kd.data.loader import Batches
from kd.losses.cross_entropy import cross_entropy
from kd.types import Mix
from tests import pairs
from tests.losses.test_reference import batch_of

INDEX = torch.arange(20_000)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha):
    """Against scipy's distribution function, with fixed draws.

    Below one half only, where float32 has digits to spare; 2% of a Beta(0.2, 0.2) round to 1.
    """
    drawn = draws.random_beta(alpha, INDEX, 0, "mixup", 0).double().sort().values
    below = (torch.arange(len(INDEX)) + 0.5) / len(INDEX)
    gap = abs(torch.from_numpy(beta(alpha, alpha).cdf(drawn.numpy())) - below)
    assert gap[drawn < 0.5].max() < 0.015
    assert abs((drawn < 0.5).double().mean() - 0.5) < 0.01
    assert abs(drawn.var() - 1 / (4 * (2 * alpha + 1))) < 0.005


def test_mixup_blends_and_cutmix_pastes():
    image, other = torch.zeros(200, 3, 16, 16), torch.ones(200, 3, 16, 16)
    up = draws.draw_mixing(ViewConfig(mixup=1.0), (16, 16), INDEX[:200], 0, 0)
    mixed = augment.mix(image, other, up)
    torch.testing.assert_close(mixed, (1 - up.weight)[:, None, None, None].expand_as(mixed))
    cut = draws.draw_mixing(ViewConfig(cutmix=1.0), (16, 16), INDEX[:200], 0, 0)
    pasted = augment.mix(image, other, cut)
    assert set(pasted.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(1 - pasted.mean((1, 2, 3)), cut.weight)
    both = draws.draw_mixing(ViewConfig(mixup=1.0, cutmix=1.0), (16, 16), INDEX, 0, 0)
    assert abs(both.paste.float().mean() - 0.5) < 0.02


def test_erasing_takes_its_share_of_images_and_area():
    image = torch.ones(2000, 1, 32, 32)
    erased = 1 - augment.erase(image, draws.draw_erased(0.25, (32, 32), INDEX[:2000], 0, 0)).mean((1, 2, 3))
    assert abs((erased > 0).float().mean() - 0.25) < 0.03
    assert erased.max() < 0.36
    assert erased[erased > 0].mean() == pytest.approx(0.17, abs=0.03)


def test_cross_entropy_of_a_mixed_image_weighs_both_labels():
    logits, label, other = torch.randn(6, 10), torch.arange(6), torch.arange(6).flip(0)
    weight = torch.rand(6)
    batch = batch_of(label)._replace(mix=Mix(other, weight))
    target = weight[:, None] * F.one_hot(label, 10) + (1 - weight)[:, None] * F.one_hot(other, 10)
    torch.testing.assert_close(cross_entropy(logits, batch), -(target * logits.log_softmax(1)).sum(1).mean())


HARD = ("crd", "dkd", "nkd", "pld", "rld", "tfkd")  # which compare with one class of each image


@pytest.mark.parametrize("method", METHODS)
def test_every_method_weighs_both_labels_or_refuses_mixing(method):
    """Its terms of a mixed image are the mean of those with either label."""
    distiller, teacher = pairs.build(method)
    assert distiller.loss.needs_hard_labels == (method in HARD)
    if method in HARD:
        return
    batch = pairs.batch_of(torch.arange(12), method=method)
    other = batch.label.roll(1)
    mixed = batch._replace(mix=Mix(other, torch.full((12,), 0.3)))
    terms = [pairs.terms_of(distiller, teacher, batch) for batch in (mixed, batch, batch._replace(label=other))]
    changed = 0
    for name, term in terms[0].items():
        torch.testing.assert_close(term, 0.3 * terms[1][name] + 0.7 * terms[2][name])
        changed += not torch.allclose(terms[1][name], terms[2][name])
    assert changed > 0 or not distiller.loss.has_cross_entropy


def batches_of(*args: str) -> Batches:
    job = parse(train_defaults, "", ["--data", "synthetic", *args]).job()
    return Batches(load_data(DataConfig(source="synthetic")), job, Accelerator(cpu=True))


@pytest.mark.parametrize("args", [[], ["--mixup", "1", "--cutmix", "1", "--erase", "0.5"]])
def test_an_images_view_does_not_depend_on_its_batch(args):
    """The same index among others, in another batch size, gives the same pixels."""
    one, other = batches_of("--batch-size", "50", *args), batches_of("--batch-size", "30", *args)
    seen = {}
    for batch in one.epoch(1):
        seen |= {int(index): image for index, image in zip(batch.index, batch.image)}
    for batch in other.epoch(1):
        assert all(torch.equal(seen[int(index)], image) for index, image in zip(batch.index, batch.image))


def test_with_views_k_epochs_repeat_and_seeds_share_them():
    def images(seed: str, epoch: int, *args: str) -> dict[int, torch.Tensor]:
        epochs = batches_of("--seed", seed, "--batch-size", "100", *args).epoch(epoch)
        return {int(i): image for batch in epochs for i, image in zip(batch.index, batch.image)}

    def same(one: dict, other: dict) -> bool:
        return all(torch.equal(one[index], other[index]) for index in one)

    first = images("0", 0, "--views", "2")
    assert same(first, images("0", 2, "--views", "2"))
    assert same(first, images("7", 0, "--views", "2"))
    assert not same(first, images("0", 1, "--views", "2"))
    assert not same(first, images("0", 0, "--views", "2", "--view-seed", "1"))
    assert not same(images("0", 0), images("7", 0))
