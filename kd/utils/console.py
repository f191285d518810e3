"""The console, and errors as one line of text. No torch here."""

import os
import re
import textwrap

from rich.console import Console

console = Console()

ESCAPE_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours of a terminal


def print_once(line: str) -> None:
    """Print a line from the first process of a run only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` columns, cut in the middle: names differ at both ends."""
    if len(text) <= width:
        return text
    start = (width - 1) // 2
    return f"{text[:start]}…{text[len(text) - (width - 1 - start) :]}"


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception's type and message as one line of at most `limit` characters, cut between words."""
    line = " ".join(ESCAPE_CODES.sub("", f"{type(error).__name__}: {error}").split())
    if len(line) <= limit:
        return line
    end = " ..."
    return (textwrap.shorten(line, limit - len(end), placeholder="") or line[: limit - len(end)]) + end


def root_cause(error: BaseException) -> BaseException:
    """What a library's own exception was raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
