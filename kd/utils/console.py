import os

from rich.console import Console


def print_once(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


console = Console()


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` columns, cut in the middle: names differ at both ends."""
    if len(text) <= width:
        return text
    start = (width - 1) // 2
    return f"{text[:start]}…{text[len(text) - (width - 1 - start) :]}"
