"""Names and errors that fit one line."""

import pytest

from kd.utils.console import one_line, root_cause, shorten


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9, 40])
def test_a_long_name_is_shortened_in_the_middle(width):
    name = "kd my_package.networks:a_very_long_name_v2"
    short = shorten(name, width)
    assert len(short) == min(width, len(name))
    assert short == name or "…" in short


def test_both_ends_stay():
    assert shorten("kd timm/vit_small_patch16", 11) == "kd ti…tch16"
    assert shorten("short", 5) == "short"


def test_an_error_becomes_one_short_line():
    assert one_line(ValueError("a\n  b\tc")) == "ValueError: a b c"
    assert one_line(KeyError("name")) == "KeyError: 'name'"
    assert len(one_line(OSError("x" * 500))) == 200
    assert one_line(OSError("a long tale"), limit=18) == "OSError: a ..."
    assert one_line(OSError("\x1b[31mred\x1b[0m")) == "OSError: red"


def test_the_cause_that_a_library_hides_is_found():
    outer, inner = ValueError("an error occurred"), KeyError("label")
    outer.__cause__ = inner
    assert root_cause(outer) is inner
    assert root_cause(inner) is inner
