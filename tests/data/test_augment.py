"""Crops, flips, orders and seeds: pure functions of (seed, epoch, index), uniform, and equal to a naive loop."""

import pytest
import torch
import torch.nn.functional as F

from kd.config import ViewConfig
from kd.data import augment, rows
from kd.utils import rng

CROP = ViewConfig(crop_padding=4, flip=True)
PINNED_BITS = [3536743990, 763792712, 3442930797]
PINNED_ORDER = [5, 6, 1, 3, 0, 2, 4, 7]


def test_a_view_depends_on_seed_epoch_and_index_alone():
    index = torch.arange(1000)
    all_views = augment.draw_crop_flip(CROP, 1, 5, index)
    shuffled = torch.randperm(1000)
    torch.manual_seed(99)  # must not matter
    again = augment.draw_crop_flip(CROP, 1, 5, shuffled)
    for one, other in zip(all_views, again, strict=True):
        assert torch.equal(one[shuffled], other)


@pytest.mark.parametrize(("seed", "number"), [(2, 5), (1, 6)])
def test_another_seed_or_epoch_gives_other_views(seed, number):
    index = torch.arange(1000)
    same = augment.draw_crop_flip(CROP, 1, 5, index).top == augment.draw_crop_flip(CROP, seed, number, index).top
    assert 0.05 < same.float().mean() < 0.2  # one in nine by chance


def test_views_are_evenly_spread_and_independent():
    index = torch.arange(90_000)
    view = augment.draw_crop_flip(CROP, 0, 0, index)
    for offsets in (view.top, view.left):
        counts = torch.bincount(offsets, minlength=9)
        assert (counts - 10_000).abs().max() < 500  # five standard deviations
    assert abs(view.flip.float().mean() - 0.5) < 0.01
    pairs = torch.stack([view.top.double(), view.left.double(), view.flip.double()])
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 0.02


def test_no_flip_and_no_padding_leave_images_alone():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    still = ViewConfig(crop_padding=0, flip=False)
    assert torch.equal(augment.crop_and_flip(images, augment.draw_crop_flip(still, 0, 0, torch.arange(6)), 0), images)


def test_crop_and_flip_agrees_with_cropping_one_by_one():
    images = torch.randint(0, 256, (32, 3, 10, 7), dtype=torch.uint8)
    view = augment.draw_crop_flip(CROP, 0, 3, torch.arange(32))
    seen = augment.crop_and_flip(images, view, 4)
    for image, top, left, flip, result in zip(images, view.top, view.left, view.flip, seen):
        crop = F.pad(image, (4, 4, 4, 4))[:, top : top + 10, left : left + 7]
        assert torch.equal(crop.flip(2) if flip else crop, result)


def test_row_26_order_visits_every_sample_once_and_changes_with_the_epoch():
    first, second = rng.order(0, 0, 1000), rng.order(0, 1, 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert not torch.equal(first, second)
    assert not torch.equal(first, rng.order(1, 0, 1000))
    assert torch.equal(first, rng.order(0, 0, 1000))


def test_values_never_change():
    """A run that is resumed with a later version must see the same images: never change these numbers."""
    assert rng.random_bits(torch.arange(3), 0, "top", 0).tolist() == PINNED_BITS
    assert rng.order(0, 0, 8).tolist() == PINNED_ORDER


def test_normalize_gives_mean_zero_and_deviation_one():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    pixels = images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    seen = rows.normalize(images, mean.float(), std.float())
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(seen, expected.float(), rtol=1e-4, atol=1e-5)


def test_a_step_seeds_each_process_differently_and_repeatably():
    draws = []
    for step, process in ((3, 0), (3, 1), (4, 0), (3, 0)):
        rng.seed_step(7, step, process, torch.device("cpu"))
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("flags", [{"colour_jitter": 0.4}, {"resized_crop": 0.3}, {"alternating_flip": True}])
def test_what_is_drawn_for_all_rows_at_once_is_what_a_batch_draws(flags):
    config, index = ViewConfig(**flags), torch.randperm(999)[:50]
    images = torch.randint(0, 256, (50, 3, 20, 24), dtype=torch.uint8)
    every = augment.draw(config, (20, 24), torch.arange(999), 1, 5, (16, 20))
    looked_up = augment.augment(config, images, index, 1, 5, (16, 20), every.of(index))
    assert torch.equal(looked_up, augment.augment(config, images, index, 1, 5, (16, 20)))
    assert not torch.equal(looked_up, augment.augment(config, images, index, 1, 5, (16, 20), every.of(index.flip(0))))
