"""Write a report: find the runs, list what was left out, and write report.md, report.html and the figures."""

import shlex
import sys
from collections.abc import Collection
from pathlib import Path

from kd.errors import UserError, require
from kd.report.document import Block, Heading, Lines, Paragraph, Table, markdown, numbered, page
from kd.runs.results import Other, Run, collect_runs
from kd.utils.console import console
from kd.utils.files import write_atomically

TITLE = "What was gained, with its noise"


def write_report(
    patterns: list[str],
    out: Path,
    failures: tuple[Other, ...] = (),
    trust_code: bool = False,
    measure_again: bool = False,
    trained: Collection[Path] = (),
    command: str = "",
    against: str = "",
) -> list[Block]:
    """Read the runs, write the report into `out`, and return its blocks.

    `failures` are listed beside everything else that is not a finished run. Networks of the runs in `trained` are
    built without `trust_code`. `command` made the report. `against`: a method with which all others are compared, too.
    Raises UserError: no folder matches, `out` cannot be written, nothing can be compared with `against`.
    """
    from kd.report.costs import Costs
    from kd.report.opening import how_it_was_made
    from kd.report.tables import section

    try:
        out.mkdir(parents=True, exist_ok=True)
        runs, others = collect_runs(patterns)
        nothing = not runs and not failures and all(other.state == "missing" for other in others)
        require(not nothing, f"{' '.join(patterns)}: no such folder, and no folder matches; name run folders")
        costs = Costs(out / "costs.json", trust_code, measure_again, trained)
        blocks: list[Block] = [Heading(1, TITLE), Paragraph(_count(len(runs), len(others) + len(failures)))]
        notes = []
        for number, (name, groups) in enumerate(_grouped(runs, against).items(), start=1):
            added, missing = section(name, groups, costs, f"data{number}_" if number > 1 else "")
            blocks += added
            notes += missing
        blocks += _left_out([*failures, *others])
        notes += [f"{folder}: cost not measured: {why}" for folder, why in costs.notes.items()]
        if notes:
            blocks += [Heading(2, "What could not be shown"), Lines(tuple(dict.fromkeys(notes)))]
        made = how_it_was_made(runs, command, costs.machine)
        blocks = numbered([*blocks, Heading(2, "How this report was made", quiet=True), made])
        _write(out, blocks)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error}); choose another") from error
    return blocks


def _grouped(runs: list[Run], against: str) -> dict[str, list]:
    """The groups of each data set, compared with the method `against`, too. Raises UserError if that compares none."""
    from kd.report.groups import by_data, compare_with

    sections = by_data(runs)
    compared = [compare_with(groups, against) for groups in sections.values() if against]
    require(
        not against or any(compared),
        f"--against {against}: no run of it by the recipe and teacher of another method's; name such runs, too",
    )
    return sections


def _count(finished: int, others: int) -> str:
    words = f"{finished} finished run{'s' * (finished != 1)}"
    return f"{words}; {others} more listed below are not counted." if others else f"{words}."


def _left_out(others: list[Other]) -> list[Block]:
    if not others:
        return []
    table = Table(("folder", "state", "why"), [tuple(other) for other in others], words=2, remark=True)
    return [Heading(2, "Not counted"), table]


def _write(out: Path, blocks: list[Block]) -> None:
    from kd.report.document import Figure
    from kd.report.figures import FILES

    figures = {block.file: block.png for block in blocks if isinstance(block, Figure)}
    earlier = [path for path in out.iterdir() if FILES.fullmatch(path.name)]
    require(
        not earlier or (out / "report.html").exists(),
        f"--out {out}: has {earlier and earlier[0].name} and no earlier report, which it could be of; name another"
        " folder",
    )
    for name, png in figures.items():
        write_atomically(out / name, lambda partial, png=png: partial.write_bytes(png))
    for path in earlier:
        if path.name not in figures:
            path.unlink()
    texts = {"report.md": markdown(blocks), "report.html": page(TITLE, blocks)}
    for name, text in texts.items():
        write_atomically(out / name, lambda partial, text=text: _write_text(partial, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # a folder's name may be any bytes


def command_line(module: str, args: list[str] | None) -> str:
    """The command that a module's main(args) was started with."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if args is None else args)])


def show(blocks: list[Block], out: Path) -> None:
    """Print the report on the terminal, without the figures and the table of every run."""
    from rich.console import Console

    wide = console if console.is_terminal else Console(width=160)
    for block in blocks:
        block.show(wide)
    files = f"\nreport: {out / 'report.md'} and {out / 'report.html'}"
    wide.print(files, markup=False, highlight=False, soft_wrap=True)
