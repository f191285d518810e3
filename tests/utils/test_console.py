"""Errors as one line."""

from kd.utils.console import one_line


def test_an_error_becomes_one_short_line():
    assert one_line(ValueError("a\n  b\tc")) == "ValueError: a b c"
    assert one_line(KeyError("name")) == "KeyError: 'name'"
    assert len(one_line(OSError("x" * 500))) == 200
    assert one_line(OSError("x" * 500), limit=12) == "OSError: xxx"
