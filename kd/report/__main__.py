"""What distillation gained, and how much of it is noise: tables and figures from finished runs.

    python -m kd.report runs/*                       run folders, folders of them, or globs
    python -m kd.report runs/digits --out report
    python -m kd.report runs/* --against dkd         also every other method with dkd, not the student alone only
    python -m kd.report --keep docs/measurements/NAME --command COMMAND runs/*    keep small files of runs
    python -m kd.report --from docs/measurements     write a page of tables from the runs kept there

Prints the tables and writes report.md, report.html (one self-contained file) and the figures into --out. All numbers
come from the runs' files, and the test set is not read again; only the cost of a network is measured here.
"""

import argparse
import sys
from pathlib import Path

from kd.errors import exit_code, require
from kd.report.build import command_line, show, write_report


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m kd.report", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, folders of them, or globs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report (default: report)")
    parser.add_argument("--against", default="", metavar="METHOD", help="compare the other methods with this one, too")
    parser.add_argument(
        "--trust-code", action="store_true", help="also time networks that are a module:function, which runs their code"
    )
    parser.add_argument(
        "--measure-again", action="store_true", help="time all networks again, even those in costs.json"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="copy what tables need of the runs, without weights"
    )
    parser.add_argument("--command", action="append", default=[], help="with --keep: what trained the runs; repeatable")
    parser.add_argument(
        "--from", type=Path, dest="kept", metavar="FOLDER", help="write README.md from the runs kept there"
    )
    flags = parser.parse_args(args)
    if flags.keep or flags.kept:
        return _measurements(parser, flags)
    require(bool(flags.runs), "name run folders, folders of them, or globs: python -m kd.report runs/*")
    require(not flags.command, "--command: is for --keep")
    require(not flags.out.exists() or flags.out.is_dir(), f"--out {flags.out}: is a file; name a folder")
    options = {"trust_code": flags.trust_code, "measure_again": flags.measure_again, "against": flags.against}
    blocks = write_report(flags.runs, flags.out, **options, command=command_line("kd.report", args))
    show(blocks, flags.out)


def _measurements(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Keep runs, or write the page of those that are kept."""
    from kd.report.kept import keep, write_page

    require(not (flags.keep and flags.kept), "--keep and --from: give one of them; --from writes the page afterwards")
    require(not flags.against, "--against: is for a report; leave it out")
    require(flags.out == parser.get_default("out"), "--out: is for a report; --from writes README.md into its folder")
    if flags.keep:
        require(bool(flags.runs), f"--keep {flags.keep}: name the runs to keep")
        print(f"{flags.keep}: {len(keep(flags.runs, flags.keep, flags.command))} runs kept")
        return
    require(not flags.runs and not flags.command, "--from: takes no runs; they are those kept in its folder")
    write_page(flags.kept)
    print(f"wrote {flags.kept / 'README.md'}")


if __name__ == "__main__":
    sys.exit(exit_code(main, "the same command starts over"))
