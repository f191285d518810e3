"""tests/README.md names, for every fault, tests that exist."""

import re

from tests.conftest import ROOT

TABLE = (ROOT / "tests" / "README.md").read_text()
ROWS = [line.split(" | ") for line in TABLE.splitlines() if re.match(r"\| \d+ \|", line)]


def test_every_fault_has_its_row_and_its_tests_exist():
    assert [int(row[0].strip("| ")) for row in ROWS] == list(range(1, 51))
    for number, _, _, named in ROWS:
        module = ""
        words = re.findall(r"`([\w.:]+?)(?:\.\.\.)?`", named)
        assert words or "GPU" in named, number
        for word in words:
            module, _, name = word.rpartition("::") if "::" in word else (module, "", word)
            if (ROOT / "tests" / f"{name}.py").exists():
                continue
            if name.startswith("test_"):
                text = (ROOT / "tests" / f"{module}.py").read_text()
                whole = "" if f"{name}..." in named else r"\("
                assert re.search(rf"def {name}{whole}", text), f"row {number}: {module} has no {name}"
