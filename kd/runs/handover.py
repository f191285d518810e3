"""How a script passes the folders of its runs to the study that started it. No torch here."""

import json
import os
from contextlib import suppress
from pathlib import Path

FOLDERS_FILE = "KD_RUN_FOLDERS_FILE"  # environment variable that a study sets: the file to append to


def announce(role: str, folder: Path) -> None:
    """Append a run that this process opens to the study's file; outside a study, do nothing."""
    if file := os.environ.get(FOLDERS_FILE):
        with suppress(OSError), open(file, "a", encoding="utf-8") as lines:  # a study that is gone stops no run
            lines.write(json.dumps([role, str(folder)]) + "\n")


def announced(file: Path) -> list[tuple[str, Path]]:
    """Role and folder of each run that a script has opened, in order: a teacher trained on the way, then its own."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    complete = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
    return [(role, Path(folder)) for role, folder in complete]
