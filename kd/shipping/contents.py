"""Every file of an export, into an empty folder."""

import argparse
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from rich.console import Console

from kd.costs import machine
from kd.data import Data
from kd.display import console
from kd.files import write_atomically, write_json
from kd.reporting.document import Block, Heading, Lines, markdown
from kd.shipping.card import Subject, write_card
from kd.shipping.cost_table import table, verdicts
from kd.shipping.formats import make_files
from kd.shipping.preprocess import describe
from kd.shipping.shipped import candidates, measure
from kd.shipping.source import Source, alone, copy_run


def fill(
    folder: Path,
    source: Source,
    data: Data | None,
    calibration: UInt8[np.ndarray, "n 3 h w"] | None,
    given: argparse.Namespace,
) -> None:
    """Write what `given`, the flags of kd.export, asks for. Raises UserError where a format cannot be made.

    `data`: for the table; `calibration`: the images that int8's ranges are taken from.
    """
    expects = describe(source.info)
    write_json(folder / "preprocessing.json", expects)
    summary, record = copy_run(source, folder)
    differences = make_files(folder, source, set(given.formats), calibration)
    blocks = _tabulate(folder, source, data, differences, given) if given.table else []
    onnx = sorted((path.name for path in folder.glob("*.onnx")), reverse=True)
    subject = Subject(summary, record, alone(source), expects, onnx, blocks)
    write_card(folder / "README.md", subject, given.license, given.push)


def _tabulate(
    folder: Path, source: Source, data: Data, differences: dict[str, float], given: argparse.Namespace
) -> list[Block]:
    """Measure every file in `folder`; export.json and export.md are written, and the same shown."""
    listed, notes = candidates(folder, source, data, given.trust_code)
    rows = measure(listed, data, given.threads)
    where = machine(given.threads)
    notes = (*verdicts(rows, source.summary), *notes)
    blocks = [table(rows, where, len(data.test.labels)), Lines(notes)]
    numbers = {"rows": rows, "machine": where, "threads": given.threads, "test_images": len(data.test.labels)}
    if "int8" in given.formats:
        numbers["calibration_images"] = min(given.calibration, len(data.train.labels))
    numbers |= {"differences_on_random_pixels": differences, "notes": notes}
    write_json(folder / "export.json", numbers)
    text = markdown([Heading(1, "What was exported"), *blocks])
    write_atomically(folder / "export.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    wide = console if console.is_terminal else Console(width=160)
    for block in blocks:
        block.show(wide)
    return blocks
