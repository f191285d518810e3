"""kd.data.augment.VERSION: whoever changes a draw must raise it, or shared caches answer for other views."""

from dataclasses import fields, replace

import pytest
import torch

from kd.config import ViewConfig
from kd.data import augment, draws
from kd.utils import rng
from tests import golden_views


def test_views_are_those_recorded_for_this_version():
    golden = golden_views.recorded()
    advice = "raise kd.data.augment.VERSION, then run python -m tests.golden_views"
    assert golden["version"] == augment.VERSION, "recorded for another version: python -m tests.golden_views"
    assert golden["views"].keys() == golden_views.CASES.keys(), "python -m tests.golden_views"
    assert golden_views.changed(golden) == [], advice


def test_every_flag_of_the_views_has_a_recorded_case():
    default, used = ViewConfig(count=3), {"count"}
    for flags in golden_views.CASES.values():
        config = replace(default, **{name: value for name, value in flags.items() if name != "two_views"})
        used |= {field.name for field in fields(config) if getattr(config, field.name) != getattr(default, field.name)}
    assert used == {field.name for field in fields(ViewConfig)}, "add a case to tests/golden_views.py"


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("random_below", {"crop and flip", "upside down", "mixup and cutmix"}),
        ("random_uniform", {"resized crop", "hue", "blur", "erase", "cutmix", "colour jitter", "strong view"}),
        ("draw_policy", {"trivial", "rand", "augmix", "strong view"}),
    ],
)
def test_a_changed_draw_is_seen(name, cases, monkeypatch):
    real = getattr(draws, name)
    one_word_more = lambda *args: real(*args, "x")  # noqa: E731
    next_seed = lambda policy, size, index, seed, number: real(policy, size, index, seed + 1, number)  # noqa: E731
    monkeypatch.setattr(draws, name, next_seed if name == "draw_policy" else one_word_more)
    assert cases <= set(golden_views.changed(golden_views.recorded()))


def test_a_changed_order_of_random_bits_is_seen(monkeypatch):
    real = rng.random_bits
    monkeypatch.setattr(rng, "random_bits", lambda *args: real(*args) ^ 1 << 30)
    assert "crop and flip" in golden_views.changed(golden_views.recorded())


def test_one_level_more_or_less_is_the_same_view(monkeypatch):
    real = golden_views.draw
    monkeypatch.setattr(golden_views, "draw", lambda flags: [_brighter(view) for view in real(flags)])
    assert golden_views.changed(golden_views.recorded()) == []


def _brighter(view: torch.Tensor) -> torch.Tensor:
    return (view.int() + 1).clamp(max=255).to(torch.uint8)
