"""tests/README.md says, for every fault, which files hold tests that are named after its row."""

import re

from tests.conftest import ROOT

TABLE = (ROOT / "tests" / "README.md").read_text()
ROWS = [line.split(" | ") for line in TABLE.splitlines() if re.match(r"\| \d+ \|", line)]
WITHOUT = {48}  # needs a GPU


def held(row: int) -> dict[str, int]:
    """File -> how many of its tests are named after the row."""
    name = rf"^def test_(?:row_\d+_)*row_{row}_\w+\("
    counts = {path.stem: len(re.findall(name, path.read_text(), re.M)) for path in (ROOT / "tests").rglob("test_*.py")}
    return {file: count for file, count in counts.items() if count}


def test_every_fault_has_its_row_and_the_tests_that_it_names():
    assert [int(row[0].strip("| ")) for row in ROWS] == list(range(1, 51))
    for number, (_, _, _, named) in enumerate(ROWS, start=1):
        files = {file: int(count or 1) for file, count in re.findall(r"`(test_\w+)`(?: \((\d+)\))?", named)}
        assert files == held(number), f"row {number}"
        assert files or number in WITHOUT
