"""TrivialAugment, RandAugment and AugMix: every operation against torchvision's, pure and independent of the batch."""

import math

import numpy as np
import pytest
import torch

from kd.data import policies
from kd.data.policies import CHAINS, Policy, apply_policy, draw_policy, operations
from kd.utils.operators import define_operators
from kd.utils.rng import random_below, random_uniform

POLICIES = [Policy("trivial"), Policy("rand"), Policy("rand", 3, 30), Policy("augmix"), Policy("augmix", magnitude=10)]
SIZES = [(32, 32), (9, 14)]
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def theirs():
    define_operators()
    from torchvision.transforms import v2

    return v2


def pictures(number: int, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    """Smooth images, as photographs are, with a little noise; the last has one colour."""
    draw = np.random.default_rng(0)
    coarse = torch.from_numpy(draw.uniform(0, 255, (number, 3, 4, 4))).float()
    images = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    images += torch.from_numpy(draw.normal(0, 5, images.shape)).float()
    images[-1] = 77
    return images.clamp(0, 255).to(torch.uint8)


def applied(policy: Policy, images: torch.Tensor, index: torch.Tensor, seed: int, number: int) -> torch.Tensor:
    return apply_policy(images, draw_policy(policy, tuple(images.shape[2:]), index, seed, number))


def transform_of(policy: Policy):
    """torchvision's own object of a policy."""
    v2 = theirs()
    made = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment, "augmix": v2.AugMix}[policy.name]
    return made()


def halfway(name: str, magnitude: float, size: tuple[int, int]) -> torch.Tensor:
    """Pixels whose source lies halfway between two others, in double: either of these is as near."""
    height, width = size
    a, b, c, d, e, f = policies._row(name, magnitude, size)[1]
    y, x = np.mgrid[:height, :width]
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    columns, rows = a * x + b * y + c + width / 2, d * x + e * y + f + height / 2  # whole numbers: between two pixels
    near = lambda place: abs(place - place.round()) < 1e-4  # noqa: E731
    return torch.from_numpy(near(columns) | near(rows))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_operation_is_torchvisions_to_one_level(policy, size):
    transform, images = transform_of(policy), pictures(8, size)
    table = policies._table(policy, size, images.device)
    interpolation = "bilinear" if policy.name == "augmix" else "nearest"
    changed_at_all = 0
    for place, (name, magnitude) in enumerate(operations(policy, size)):
        drawn = torch.full((len(images),), place)
        ours = policies._change(images, table.change(drawn), interpolation).int()
        reference = transform._apply_image_or_video_transform(images, name, magnitude, transform.interpolation, {})
        gap = (ours - reference.int()).abs()
        if name in MOVES and interpolation == "nearest":
            gap = gap * ~halfway(name, magnitude, size)
        assert gap.max() <= 1, (name, magnitude)
        changed_at_all += not torch.equal(ours, images.int())
    assert changed_at_all > 0.6 * len(operations(policy, size))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_operations_and_magnitudes_are_torchvisions(policy):
    transform, size = transform_of(policy), (30, 40)
    bins = 10 if policy.name == "augmix" else 31
    expected = []
    for name, (magnitudes_of, signed) in transform._AUGMENTATION_SPACE.items():
        magnitudes = magnitudes_of(bins, *size)
        values = [0.0] * bins if magnitudes is None else [float(value) for value in magnitudes]
        for level in policy.levels:
            expected += [(name, values[level]), (name, values[level] * (-1 if signed else 1))]
    assert sorted(operations(policy, size)) == sorted(expected)
    default = transform_of(policy)
    if policy == Policy("rand"):
        assert (default.num_ops, [default.magnitude]) == (policy.ops, list(policy.levels))
    if policy == Policy("augmix"):
        assert (default.severity, default.mixture_width) == (len(policy.levels), CHAINS)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_sample_alone_is_what_it_is_in_a_batch(policy):
    images, index = pictures(64), torch.arange(1000, 1064)
    together = applied(policy, images, index, 3, 5)
    order = torch.randperm(64)
    assert torch.equal(applied(policy, images[order], index[order], 3, 5), together[order])
    for row in range(64):
        assert torch.equal(applied(policy, images[row : row + 1], index[row : row + 1], 3, 5)[0], together[row])


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_another_seed_number_or_sample_gives_another_view(policy):
    images, index = pictures(1).expand(64, -1, -1, -1) + torch.arange(32, dtype=torch.uint8), torch.arange(64)
    view = applied(policy, images, index, 0, 0)
    for other in ((index, 1, 0), (index, 0, 1), (index + 64, 0, 0)):
        same = (applied(policy, images, *other) == view).flatten(1).all(dim=1)
        assert same.float().mean() < 0.5
    assert torch.equal(applied(policy, images, index, 0, 0), view)


def test_no_operations_leave_images_alone():
    images = pictures(4)
    assert torch.equal(applied(Policy("rand", ops=0), images, torch.arange(4), 0, 0), images)


def test_all_operations_are_drawn_equally_often():
    index, space = torch.arange(90_000), operations(Policy("trivial"), (32, 32))
    table = policies._table(Policy("trivial"), (32, 32), index.device)
    drawn = torch.bincount(policies._draw(table, index, 0, "policy", 0, 0), minlength=len(space))
    names = sorted({name for name, _ in space})
    shares = [sum(int(n) for n, (other, _) in zip(drawn, space, strict=True) if other == name) for name in names]
    assert len(names) == 14
    assert max(abs(share - 90_000 / 14) for share in shares) < 5 * math.sqrt(90_000 / 14)


def test_augmix_is_the_mean_of_chains_made_one_by_one():
    """torchvision's loop, with our draws in place of its own."""
    policy, size, images = Policy("augmix"), (32, 32), pictures(48)
    transform, space = transform_of(policy), operations(policy, size)
    index, bilinear = torch.arange(48), theirs().InterpolationMode.BILINEAR
    ours = applied(policy, images, index, 1, 2)
    for row, image in enumerate(images):
        own = random_uniform(index[row], 1, "augmix own", 2).item()
        low, high = sorted(random_uniform(index[row], 1, "augmix cut", cut, 2).item() for cut in range(2))
        mean = own * image
        for chain, share in enumerate((low, high - low, 1 - high)):
            draw, changed = index[row] * CHAINS + chain, image
            for step in range(1 + int(random_below(3, draw, 1, "augmix depth", 2))):
                name, magnitude = space[int(random_below(len(space), draw, 1, "augmix", step, 2))]
                changed = transform._apply_image_or_video_transform(changed, name, magnitude, bilinear, {})
            mean = mean + (1 - own) * share * changed
        # Half a level from rounding the mean, one from each operation, which the next (equalize) may enlarge.
        gap = (ours[row] - mean).abs()
        assert (gap > 1.5).float().mean() < 0.01
        assert gap.mean() < 0.5


def test_on_a_gpu_all_rows_are_computed_and_the_drawn_ones_selected(monkeypatch):
    """The GPU's way through the kernels, here on the CPU, gives the same bytes."""
    images, index = pictures(64), torch.arange(64)
    for policy in POLICIES:
        table = policies._table(policy, (32, 32), images.device)
        drawn = policies._draw(table, index, 0, "policy", 0, 0)
        by_rows = policies._change(images, table.change(drawn), "nearest")
        with monkeypatch.context() as patch:
            patch.setattr(policies, "_by_rows", lambda images: False)
            assert torch.equal(policies._change(images, table.change(drawn), "nearest"), by_rows)
