"""The console, and errors as one line of text. No torch here."""

import os

from rich.console import Console

console = Console()


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
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]
