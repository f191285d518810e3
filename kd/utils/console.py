import os

from rich.console import Console


def print_once(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


console = Console()
