"""What fits a line of a terminal."""

import pytest

from kd.utils.console import shorten


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9, 40])
def test_a_long_name_is_shortened_in_the_middle(width):
    name = "kd my_package.networks:a_very_long_name_v2"
    short = shorten(name, width)
    assert len(short) == min(width, len(name))
    assert short == name or "…" in short


def test_both_ends_stay():
    assert shorten("kd timm/vit_small_patch16", 11) == "kd ti…tch16"
    assert shorten("short", 5) == "short"
