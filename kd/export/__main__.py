"""Export a finished run as files to deploy, and measure the accuracy, size and speed of each.

    python -m kd.export RUN --all                      every format, and the table
    python -m kd.export RUN --formats onnx int8        these formats only
    python -m kd.export RUN --all --push USER/NAME     also push to the Hub, with a model card

Writes RUN/export/ completely or not at all: model.safetensors with what kd.load needs, model.onnx, model.int8.onnx,
model.pt2, preprocessing.json, the model card (README.md) and the table (export.json, export.md). The .onnx and .pt2
files take RGB pixels, 0 to 255, and return logits; their metadata describes the input and lists the class names. An
embedder's (of the method embed) return embeddings; it has no table, and no int8 file.
Exports contain no local paths: only the last component of a path is kept. An export is refused if one of its files
predicts otherwise than the network on too many images (--min-agreement).
"""

import argparse
import sys
from pathlib import Path

from kd.errors import UserError, exit_code, nearest, require
from kd.export import FILES, MIN_AGREEMENT
from kd.export.onnx_runtime import import_extra
from kd.utils.hub import check_id, push
from kd.utils.system import Lock, sigterm_as_interrupt

RUN_FILES = ("model.json", "summary.json", "config.json")
EXPORT_FILES = {*FILES.values(), *RUN_FILES, "preprocessing.json", "README.md", "export.json", "export.md"}

ONNX_MODULES = ("onnx", "onnxscript", "onnxruntime")  # of the extra `export`
EXTRA_MODULES = {"onnx": ONNX_MODULES, "int8": ONNX_MODULES}

CALIBRATION_IMAGES = 512
THREADS = 1


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with sigterm_as_interrupt():
        folder = export(args)
        print(f"exported: {folder}", flush=True)
        if args.push:
            print(f"pushed: {push(folder, args.push, args.private)}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The checked flags. Raises UserError."""
    parser = argparse.ArgumentParser("python -m kd.export", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help=f"any of {', '.join(FILES)} (default: onnx)")
    parser.add_argument("--all", action="store_true", help="every format")
    help_text = "the last step's weights (default), or the average that a run with --ema keeps"
    parser.add_argument("--weights", choices=("last", "ema"), default="last", help=help_text)
    parser.add_argument("--data", help="where the run's images are now, if they have moved")
    help_text = f"training images that set int8's ranges (default: {CALIBRATION_IMAGES})"
    parser.add_argument("--calibration", type=int, help=help_text)
    help_text = f"percent of images on which each file must predict what the network does (default: {MIN_AGREEMENT:g})"
    parser.add_argument("--min-agreement", type=float, metavar="PERCENT", help=help_text)
    parser.add_argument("--threads", type=int, help=f"CPU threads for the table's timings (default: {THREADS})")
    parser.add_argument("--no-table", dest="table", action="store_false", help="skip the table; only int8 needs data")
    parser.add_argument("--push", metavar="USER/NAME", help="push the export to this model repository on the Hub")
    parser.add_argument("--private", action="store_true", help="with --push: create the repository as private")
    parser.add_argument("--license", default="unknown", help="license id of the model card, as on the Hub (e.g. mit)")
    parser.add_argument(
        "--trust-code", action="store_true", help="allow networks, and data, that are a module:function"
    )
    args = parser.parse_args(argv)
    require(not (args.all and args.formats), "--all and --formats: give one of them")
    args.formats = list(FILES) if args.all else list(dict.fromkeys(args.formats or ["onnx"]))
    for name in args.formats:
        require(name in FILES, f"--formats {name}: no such format; {nearest(name, FILES)}")
    _check_numbers_and_unused_flags(args)
    args.calibration, args.threads = args.calibration or CALIBRATION_IMAGES, args.threads or THREADS
    args.min_agreement = MIN_AGREEMENT if args.min_agreement is None else args.min_agreement
    if args.push:
        check_id(args.push)
    return args


def _check_numbers_and_unused_flags(args: argparse.Namespace) -> None:
    for name in ("calibration", "threads"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name} {value}: give 1 or more")
    share = args.min_agreement
    require(share is None or 0 <= share <= 100, f"--min-agreement {share}: give a percentage, 0 to 100")
    int8 = "int8" in args.formats
    uses = {
        "calibration": (int8, "needs --formats int8, or --all"),
        "threads": (args.table, "only used for the table; drop it or --no-table"),
        "data": (args.table or int8, "only used for the table and int8; drop it or --no-table"),
        "min_agreement": (args.table or int8, "only used for the table and int8; drop it or --no-table"),
        "private": (args.push, "needs --push USER/NAME"),
    }
    for name, (used, message) in uses.items():
        unset = getattr(args, name) is None or getattr(args, name) is False
        require(bool(used) or unset, f"--{name.replace('_', '-')}: {message}")


def export(args: argparse.Namespace) -> Path:
    """Write RUN/export as the flags say and return its path. Raises UserError."""
    from kd.export.build import calibration_images, write_export
    from kd.export.source import read_data, read_source
    from kd.runs.results import is_labelled
    from kd.utils.files import write_folder

    for module in dict.fromkeys(module for name in args.formats for module in EXTRA_MODULES.get(name, ())):
        import_extra(module)
    is_export = (args.run / "preprocessing.json").exists()
    require(not is_export, f"{args.run}: is already an export; give the run that it was made from")
    source = read_source(args.run, args.trust_code, args.weights)
    if not source.info["classes"]:
        _without_table(args)
    tested = source.summary["test_top1"] is not None
    require(
        not args.table or is_labelled(source.summary),
        f"{args.run}: was distilled on images without labels, and the table would show accuracies; add --no-table",
    )
    require(
        not args.table or tested,
        f"{args.run}: trained with --no-test, and the table would read the test set; train it without that flag"
        " first, or add --no-table",
    )
    data = read_data(source, args.data, args.trust_code) if args.table or "int8" in args.formats else None
    calibration = calibration_images(source, data, args.calibration) if "int8" in args.formats else None
    folder = args.run / "export"
    _check_target(folder)
    lock = Lock(args.run / "lock")
    try:
        require(lock.acquire(), f"{args.run}: in use by another process; wait until it ends")
        write_folder(folder, lambda partial: write_export(partial, source, data, calibration, args))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); check its permissions and the free space") from error
    finally:
        lock.close()
    return folder


def _without_table(args: argparse.Namespace) -> None:
    """Leave out what needs predicted classes, for an embedder. Raises UserError if int8 is asked for by name."""
    require(
        args.all or "int8" not in args.formats,
        f"--formats int8: its check compares predicted classes, and {args.run} is an embedder; leave it out",
    )
    args.table, args.formats = False, [name for name in args.formats if name != "int8"]
    print(f"{args.run}: an embedder has no accuracy: no table, no int8 file", flush=True)


def _check_target(folder: Path) -> None:
    """Raise UserError if `folder` holds anything that kd.export did not write: the export replaces it."""
    from kd.runs.folder import WORTHLESS

    require(
        not folder.is_symlink(),
        f"{folder}: is a link, which an export would replace; remove it, and link the run's folder instead",
    )
    if not folder.exists():
        return
    require(folder.is_dir(), f"{folder}: is a file, not an export folder; move it elsewhere")
    others = {entry.name for entry in folder.iterdir()} - EXPORT_FILES - {*WORTHLESS}
    require(
        not others, f"{folder}: contains {', '.join(sorted(others)[:3])}, not written by kd.export; move it elsewhere"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, "no partial export is left; the same command starts over"))
