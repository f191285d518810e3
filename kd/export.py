"""A trained student as files to deploy, with what each of them costs and how good it still is.

    python -m kd.export RUN --all                      every format, and the table
    python -m kd.export RUN --formats onnx int8        these formats alone
    python -m kd.export RUN --all --push USER/NAME     and to the Hub, with a model card

Writes RUN/export/, whole or not at all: model.safetensors with what kd.load needs, model.onnx, model.int8.onnx,
model.pt2, preprocessing.json, the model card (README.md) and the table (export.json, export.md). The .onnx and .pt2
files take RGB pixels, 0 to 255, and give logits; what they expect and the class names stand in their metadata.
"""

import argparse
import sys
from pathlib import Path

from kd.display import console
from kd.errors import exit_code, nearest, require
from kd.files import write_atomically, write_folder, write_json
from kd.hub import check_id, push
from kd.lock import Lock
from kd.reporting.document import Block, Heading, Lines, markdown
from kd.shipping.onnx_runtime import needed
from kd.shipping.preprocess import describe

FORMATS = ("safetensors", "onnx", "int8", "pt2")
ONNX = ("onnx", "onnxscript", "onnxruntime")
NEEDS = {"onnx": ONNX, "int8": ONNX}  # modules of the extra `export`
OURS = {"model.json", "summary.json", "config.json", "preprocessing.json", "README.md", "export.json", "export.md"}
OURS |= {"model.safetensors", "model.onnx", "model.int8.onnx", "model.pt2"}


def export(given: argparse.Namespace) -> Path:
    """Make RUN/export as the flags say; returns it. Raises UserError for whatever the user can mend."""
    from kd.shipping.formats import calibration_images
    from kd.shipping.source import read_data, read_source

    for module in dict.fromkeys(module for key in given.formats for module in NEEDS.get(key, ())):
        needed(module)
    source = read_source(given.run, given.trust_code)
    tested = source.summary["test_top1"] is not None
    require(
        not given.table or tested,
        f"{given.run} was trained with --no-test, and the table would read the test set: train it without that flag"
        " first, or add --no-table",
    )
    data = read_data(source, given.data) if given.table or "int8" in given.formats else None
    calibration = calibration_images(data, given.calibration) if "int8" in given.formats else None
    folder = given.run / "export"
    held = {entry.name for entry in folder.iterdir()} - OURS if folder.exists() else set()
    require(not held, f"{folder} holds {', '.join(sorted(held)[:3])}, which is no export; move it elsewhere")
    lock = Lock(given.run / "lock")
    try:
        require(lock.acquire(), f"{given.run} is in use by another process; wait for it")
        write_folder(folder, lambda partial: _fill(partial, source, data, calibration, given))
    except OSError as error:
        require(False, f"{folder} cannot be written ({error})")
    finally:
        lock.close()
    return folder


def _fill(folder: Path, source, data, calibration, given: argparse.Namespace) -> None:
    """Every file of an export, into an empty folder."""
    from kd.shipping.card import Subject, write_card
    from kd.shipping.formats import make_files
    from kd.shipping.source import alone, copy_run

    expects = describe(source.info)
    write_json(folder / "preprocessing.json", expects)
    summary, record = copy_run(source, folder)
    differences = make_files(folder, source, set(given.formats), calibration)
    blocks = _tabulate(folder, source, data, differences, given) if given.table else []
    onnx = sorted((path.name for path in folder.glob("*.onnx")), reverse=True)
    subject = Subject(summary, record, alone(source), expects, onnx, blocks)
    write_card(folder / "README.md", subject, given.license, given.push)


def _tabulate(folder: Path, source, data, differences: dict[str, float], given: argparse.Namespace) -> list[Block]:
    """Measure every file in `folder`; export.json and export.md are written, and the same shown."""
    from kd.costs import machine
    from kd.shipping.shipped import candidates, measure, table, verdicts

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
    _show(blocks)
    return blocks


def _show(blocks: list[Block]) -> None:
    from rich.console import Console

    wide = console if console.is_terminal else Console(width=160)
    for block in blocks:
        block.show(wide)


def parse(args: list[str] | None) -> argparse.Namespace:
    """The checked flags. Raises UserError."""
    parser = argparse.ArgumentParser("python -m kd.export", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run's folder")
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help=f"of {', '.join(FORMATS)} (default: onnx)")
    parser.add_argument("--all", action="store_true", help="every format")
    parser.add_argument("--data", help="where the run's own images lie now, if not where they were")
    parser.add_argument("--calibration", type=int, default=512, help="training images for int8's ranges (default: 512)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for the table's times (default: 1)")
    parser.add_argument("--no-table", dest="table", action="store_false", help="measure nothing; only int8 needs data")
    parser.add_argument("--push", metavar="USER/NAME", help="send the export to this model repository on the Hub")
    parser.add_argument("--private", action="store_true", help="with --push: create the repository private")
    parser.add_argument("--license", default="unknown", help="for the model card, as the Hub spells it, such as mit")
    parser.add_argument("--trust-code", action="store_true", help="build a network that is a module:function")
    given = parser.parse_args(args)
    require(not (given.all and given.formats), "--all and --formats: give one of them")
    given.formats = list(FORMATS) if given.all else list(dict.fromkeys(given.formats or ["onnx"]))
    for name in given.formats:
        require(name in FORMATS, f"--formats {name}: no such format; {nearest(name, FORMATS)}")
    require(given.calibration >= 1, f"--calibration {given.calibration}: give 1 or more")
    require(given.threads >= 1, f"--threads {given.threads}: give 1 or more")
    require(not given.private or bool(given.push), "--private: goes with --push USER/NAME")
    if given.push:
        check_id(given.push)
    return given


def main(args: list[str] | None = None) -> None:
    given = parse(args)
    folder = export(given)
    print(f"exported: {folder}", flush=True)
    if given.push:
        print(f"pushed: {push(folder, given.push, given.private)}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
