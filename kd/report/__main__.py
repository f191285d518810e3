"""What distillation gained, and how much of it is noise: tables and figures from finished runs.

    python -m kd.report runs/*                       run folders, folders of them, or globs
    python -m kd.report runs/digits --out report

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
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, folders of them, or globs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report (default: report)")
    parser.add_argument(
        "--trust-code", action="store_true", help="also time networks that are a module:function, which runs their code"
    )
    parser.add_argument(
        "--measure-again", action="store_true", help="time all networks again, even those in costs.json"
    )
    flags = parser.parse_args(args)
    require(not flags.out.exists() or flags.out.is_dir(), f"--out {flags.out}: is a file; name a folder")
    options = {"trust_code": flags.trust_code, "measure_again": flags.measure_again}
    blocks = write_report(flags.runs, flags.out, **options, command=command_line("kd.report", args))
    show(blocks, flags.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))
