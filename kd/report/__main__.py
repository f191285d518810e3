"""What distillation gained, with its noise: tables and figures from finished runs.

    python -m kd.report runs/*                       run folders, folders of them, or globs
    python -m kd.report runs/digits --out report

Prints the tables and writes report.md, report.html (one self-contained file) and the figures into --out. Everything
comes from the runs' own files; the test set is never read again. Only the cost of a network is measured here.
"""

import argparse
import sys
from pathlib import Path

from kd.errors import exit_code, require
from kd.report.build import show, write_report


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m kd.report", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, folders of them, or globs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="where the report goes (default: report)")
    parser.add_argument("--trust-code", action="store_true", help="time networks that are a module:function, too")
    parser.add_argument("--measure-again", action="store_true", help="time all networks anew; else costs.json is kept")
    given = parser.parse_args(args)
    require(not given.out.exists() or given.out.is_dir(), f"--out {given.out}: is a file; name a folder")
    blocks = write_report(given.runs, given.out, trust_code=given.trust_code, afresh=given.measure_again)
    show(blocks, given.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))
