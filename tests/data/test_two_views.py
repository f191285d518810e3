"""The strong view of methods with two views: pure in (seed, number, sample), the same however data is stored, and made
only for methods that ask for it."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from kd.config import METHODS, DataConfig, FitConfig, Job, NoneConfig, RunConfig, ViewConfig
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.data import augment, draws, load_data
from kd.data.loader import Batches
from kd.data.policies import Policy, operations
from kd.errors import UserError
from kd.runs.folder import run_identity
from kd.types import Batch
from tests.data.test_stream import shards
from tests.run_scripts import distil

TWO = next(kind() for kind in METHODS.values() if kind.two_views)
MIXED = ViewConfig(mixup=1.0, cutmix=1.0, erase=0.5)


def batches_of(data, views: ViewConfig, epoch: int = 1, first: int = 0, method=TWO, **fit) -> list[Batch]:
    config = FitConfig(**{"batch_size": 12} | fit)
    job = Job("test", "digits", "resnet8", method, DataConfig(), views, config, RunConfig())
    return list(Batches(data, job, Accelerator(cpu=True)).epoch(epoch, first))


def by_sample(batches: list[Batch]) -> dict[int, torch.Tensor]:
    return {int(index): image for batch in batches for index, image in zip(batch.index, batch.strong)}


@pytest.fixture(scope="module")
def data():
    return load_data(DataConfig(source="synthetic", classes=4, val_fraction=0.8))  # 80 images


@pytest.mark.parametrize(
    "views", [ViewConfig(), MIXED, ViewConfig(strong_magnitude=10)], ids=["plain", "mixed", "rand"]
)
def test_a_strong_view_does_not_depend_on_its_batch_nor_on_where_the_epoch_is_entered(data, views):
    whole, other = batches_of(data, views), batches_of(data, views, batch_size=8)
    one, alone = by_sample(whole), by_sample(other)
    assert all(torch.equal(one[index], image) for index, image in alone.items() if index in one)
    rest = batches_of(data, views, first=3)
    assert all(torch.equal(a.strong, b.strong) for a, b in zip(whole[3:], rest, strict=True))


def test_another_epoch_or_seed_is_another_strong_view_and_views_k_repeat(data):
    views = [by_sample(batches_of(data, ViewConfig(), epoch, seed=seed)) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    for other in views[1:]:
        common = views[0].keys() & other.keys()
        assert sum(torch.equal(views[0][index], other[index]) for index in common) < 0.1 * len(common)
    kept = [by_sample(batches_of(data, ViewConfig(count=2), epoch, seed=seed)) for epoch, seed in ((0, 0), (2, 1))]
    common = kept[0].keys() & kept[1].keys()
    assert len(common) > 50
    assert all(torch.equal(kept[0][index], kept[1][index]) for index in common)


def test_the_weak_view_is_that_of_a_method_with_one_view_and_the_strong_one_is_another(data):
    one, two = batches_of(data, MIXED, method=NoneConfig()), batches_of(data, MIXED)
    for a, b in zip(one, two, strict=True):
        assert a.strong is None
        assert torch.equal(a.image, b.image)
        assert b.strong.shape == b.image.shape
        assert not torch.isclose(b.image, b.strong).flatten(1).all(dim=1).any()


def test_crop_and_flip_are_drawn_apart_and_without_operations_nothing_else_differs(data):
    plain = ViewConfig(strong_ops=0, strong_cutout=0.0)
    index, stored = torch.arange(80), data.train.images[:80]
    sizes = draws.Sizes((16, 16), (16, 16))
    strong = augment.augment_strongly(plain, stored, draws.draw_strongly(plain, sizes, index, 3, 1), (16, 16))
    apart, weak = (
        augment.augment(plain, stored, draws.draw(plain, sizes, index, seed, 1), (16, 16))
        for seed in (draws.strong_seed(3), 3)
    )
    assert torch.equal(strong, apart)
    assert not torch.equal(strong, weak)


def test_mixup_mixes_both_views_with_the_same_partner_by_the_same_weight(data):
    """Both have one label, Batch.label and Batch.mix."""
    views = ViewConfig(mixup=1.0)
    strong = by_sample(batches_of(data, ViewConfig()))
    for batch in batches_of(data, views):
        partner = draws.draw_partners(len(data.train.labels), batch.index, 0, 1)
        for image, own, other, weight in zip(batch.strong, batch.index, partner, batch.mix.weight):
            if int(own) in strong and int(other) in strong:
                expected = torch.lerp(strong[int(other)], strong[int(own)], weight)
                torch.testing.assert_close(image, expected)


def test_memory_workers_and_stream_give_the_same_strong_views(tmp_path):
    folder = shards(tmp_path / "parquet")
    config = DataConfig(source=folder, image_size=16, workers=1)
    ways = [{"decode": "memory"}, {"decode": "workers"}, {"stream": True, "shuffle_rows": 1000}]
    memory, *others = (load_data(dataclasses.replace(config, **way)) for way in ways)
    strong = [
        by_sample(batches_of(dataclasses.replace(d, mean=memory.mean, std=memory.std), ViewConfig())) for d in others
    ]
    expected = by_sample(batches_of(memory, ViewConfig()))
    assert len(expected) == 36
    for found in strong:
        assert found.keys() == expected.keys()
        assert all(torch.equal(expected[index], image) for index, image in found.items())


@pytest.mark.parametrize("method", METHODS)
def test_methods_with_one_view_make_no_second_one(data, monkeypatch, method):
    made = []
    monkeypatch.setattr(augment, "augment_strongly", lambda *args: made.append(args) or augment.augment(*args))
    config = METHODS[method]()
    batches = batches_of(data, ViewConfig(), method=config)
    assert all((batch.strong is not None) == config.two_views for batch in batches)
    assert len(made) == len(batches) * config.two_views


def test_the_grey_square_has_any_side_up_to_the_largest_and_lies_anywhere():
    images = torch.zeros(4000, 3, 32, 32, dtype=torch.uint8)
    painted = augment.cut_out(images, draws.draw_cut_out(0.5, (32, 32), torch.arange(4000), 0, 0))
    grey = painted[:, 0] == augment.CUTOUT_COLOUR[0]
    assert set(painted.unique().tolist()) == {0, *augment.CUTOUT_COLOUR}
    sides = grey.any(dim=2).sum(dim=1), grey.any(dim=1).sum(dim=1)
    inside = ~(grey[:, 0].any(1) | grey[:, -1].any(1) | grey[:, :, 0].any(1) | grey[:, :, -1].any(1))
    assert torch.equal(sides[0][inside], sides[1][inside]), "a square, unless the border cuts it off"
    assert max(side.max() for side in sides) == 16
    assert (grey.sum(dim=(1, 2)) == sides[0] * sides[1]).all()
    assert grey.float().mean(dim=0).min() > 0.02, "every pixel is covered now and then"
    full = grey.sum(dim=(1, 2)).double()[inside].sqrt()
    assert np.unique(full.numpy()).tolist() == list(range(17))


def test_fixmatch_has_its_operations_in_its_ranges():
    """Against FixMatch's table: shear and translate to 0.3, rotate to 30 degrees, factors 0.05 to 1, 4 to 8 bits."""
    found: dict[str, list[float]] = {}
    for name, magnitude in operations(Policy("fixmatch"), (20, 40)):
        found.setdefault(name, []).append(magnitude)
    limits = {name: (min(values), max(values)) for name, values in found.items()}
    factors = dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (-0.95, 0.0))
    moves = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 12.0, "TranslateY": 6.0, "Rotate": 30.0}
    still = dict.fromkeys(("AutoContrast", "Equalize", "Identity"), (0.0, 0.0))
    expected = factors | still | {name: (-last, last) for name, last in moves.items()}
    expected |= {"Posterize": (4.0, 8.0), "Solarize": (0.0, 1.0)}
    assert {name: pytest.approx(pair) for name, pair in expected.items()} == limits
    assert {len(values) for values in found.values()} == {62}


def test_the_strong_views_flags_are_in_the_identity_of_methods_with_two_views_only(data):
    accelerator = Accelerator(cpu=True)

    def identity(*flags: str) -> dict:
        job = parse(distill_defaults, "", ["--data", "synthetic", *flags]).job()
        return run_identity(job, data, accelerator)

    changed = ["--strong-ops", "3", "--strong-magnitude", "10", "--strong-cutout", "0"]
    assert identity("kd") == identity(*changed, "kd")
    assert not identity("crld").keys() & ViewConfig().strong.keys()
    assert identity("crld") | {"strong_ops": 3, "strong_magnitude": 10, "strong_cutout": 0.0} == identity(
        *changed, "crld"
    )


def test_flags_of_a_view_that_is_not_made_are_said_to_change_nothing(capsys):
    flags = ["--epochs", "1", "--classes", "4", "--val-fraction", "0.8", "--batch-size", "40"]
    distil(*flags, "--strong-ops", "3", "none")
    assert "none sees one view of each image: the flags of the strong view change nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--strong-ops", "-1"], "--strong-ops -1: give 0 to 14"),
        (["--strong-magnitude", "31"], "--strong-magnitude 31: give 0 to 30"),
        (["--strong-cutout", "1.5"], "--strong-cutout 1.5: give a share from 0 to 1"),
        (["mlkd", "--temperatures", "2", "0"], r"--temperatures 2.0 0.0: give one or more numbers above 0"),
        (["crld", "--weak-threshold", "2"], "--weak-threshold 2.0: give a share from 0 to 1"),
    ],
)
def test_values_out_of_range_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        parse(distill_defaults, "", flags)
