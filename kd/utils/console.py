"""The console, and errors as one line of text. No torch here."""

import os
import re

from rich.console import Console

console = Console()

ESCAPE_CODE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]")


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
    """An exception's type and message as one line of at most `limit` characters."""
    return clip(f"{type(error).__name__}: {error}", limit)


def clip(text: str, limit: int = 200) -> str:
    """`text` as one line of at most `limit` characters, without escape codes; cut between words, and marked as cut."""
    line = " ".join(ESCAPE_CODE.sub("", text).split())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    if len(line) <= limit:
        return line
    return (line[:limit].rpartition(" ")[0] or line[: limit - 2]) + " …"


def root_cause(error: BaseException) -> BaseException:
    """What a library's own exception was raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
