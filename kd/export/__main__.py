"""A trained student as files to deploy, with what each of them costs and how good it still is.

    python -m kd.export RUN --all                      every format, and the table
    python -m kd.export RUN --formats onnx int8        these formats alone
    python -m kd.export RUN --all --push USER/NAME     and to the Hub, with a model card

Writes RUN/export/, whole or not at all: model.safetensors with what kd.load needs, model.onnx, model.int8.onnx,
model.pt2, preprocessing.json, the model card (README.md) and the table (export.json, export.md). The .onnx and .pt2
files take RGB pixels, 0 to 255, and give logits; what they expect and the class names stand in their metadata.
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from kd.errors import exit_code, nearest, require
from kd.export.onnx_runtime import needed
from kd.utils.files import write_folder
from kd.utils.hub import check_id, push
from kd.utils.system import Lock

FORMATS = ("safetensors", "onnx", "int8", "pt2")


ONNX = ("onnx", "onnxscript", "onnxruntime")


CALIBRATION = 512  # training images, unless --calibration says otherwise


NEEDS = {"onnx": ONNX, "int8": ONNX}  # modules of the extra `export`


EXPORT_FILES = {
    "model.json",
    "summary.json",
    "config.json",
    "preprocessing.json",
    "README.md",
    "export.json",
    "export.md",
}


EXPORT_FILES |= {"model.safetensors", "model.onnx", "model.int8.onnx", "model.pt2"}


def export(given: argparse.Namespace) -> Path:
    """Make RUN/export as the flags say; returns it. Raises UserError for whatever the user can mend."""
    from kd.export.build import calibration_images, fill
    from kd.export.source import read_data, read_source

    for module in dict.fromkeys(module for key in given.formats for module in NEEDS.get(key, ())):
        needed(module)
    again = (given.run / "preprocessing.json").exists()
    require(not again, f"{given.run} is an export itself, and would hold another: name the run that it was made from")
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
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file, and no export; move it elsewhere")
    held = {entry.name for entry in folder.iterdir()} - EXPORT_FILES if folder.exists() else set()
    require(not held, f"{folder} holds {', '.join(sorted(held)[:3])}, which is no export; move it elsewhere")
    lock = Lock(given.run / "lock")
    try:
        require(lock.acquire(), f"{given.run} is in use by another process; wait for it")
        write_folder(folder, lambda partial: fill(partial, source, data, calibration, given))
    except OSError as error:
        require(False, f"{folder} cannot be written ({error})")
    finally:
        lock.close()
    return folder


def parse(args: list[str] | None) -> argparse.Namespace:
    """The checked flags. Raises UserError."""
    parser = argparse.ArgumentParser("python -m kd.export", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run's folder")
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help=f"of {', '.join(FORMATS)} (default: onnx)")
    parser.add_argument("--all", action="store_true", help="every format")
    parser.add_argument("--data", help="where the run's own images lie now, if not where they were")
    parser.add_argument("--calibration", type=int, help=f"training images for int8's ranges (default: {CALIBRATION})")
    parser.add_argument("--threads", type=int, help="CPU threads for the table's times (default: 1)")
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
    _fill_in(given)
    if given.push:
        check_id(given.push)
    return given


def _fill_in(given: argparse.Namespace) -> None:
    """Numbers that were left out. Raises UserError for one out of range, and for a flag that nothing would heed."""
    int8 = "int8" in given.formats
    heeded = {
        "calibration": (int8, "goes with --formats int8, or --all"),
        "threads": (given.table, "is for the table; leave it or --no-table out"),
        "data": (given.table or int8, "is for the table and int8; leave it or --no-table out"),
        "private": (given.push, "goes with --push USER/NAME"),
    }
    for name in ("calibration", "threads"):
        value = getattr(given, name)
        require(value is None or value >= 1, f"--{name} {value}: give 1 or more")
    for name, (has_use, words) in heeded.items():
        require(bool(has_use) or not getattr(given, name), f"--{name}: {words}")
    given.calibration, given.threads = given.calibration or CALIBRATION, given.threads or 1


@contextmanager
def unwinding() -> Iterator[None]:
    """Within it SIGTERM does what Ctrl-C does, so that what is half written is removed on the way out."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(args: list[str] | None = None) -> None:
    given = parse(args)
    with unwinding():
        folder = export(given)
        print(f"exported: {folder}", flush=True)
        if given.push:
            print(f"pushed: {push(folder, given.push, given.private)}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main, "an export is whole or not there; the same command starts again"))
