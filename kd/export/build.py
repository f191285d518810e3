"""Write one export folder: every format is written, loaded back and compared with torch, then measured."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console

from kd.data import Data
from kd.data.rows import iter_centre_crops
from kd.errors import require
from kd.export import FILES, MIN_AGREEMENT
from kd.export.card import CardContent, write_card
from kd.export.deployed import open_pt2, rounds_activations, trace, write_pt2
from kd.export.int8 import Quantized, write_int8
from kd.export.measure import (
    Classifier,
    candidates,
    format_table,
    format_verdicts,
    measure_files,
    torch_classifier,
)
from kd.export.onnx_files import errors_as_messages, write_onnx
from kd.export.onnx_runtime import OnnxFile, describe
from kd.export.source import ExportedRun, control_summary, copy_run, scoring_batch
from kd.models.cost import describe_machine
from kd.report.document import Block, Heading, Lines, markdown
from kd.utils import rng
from kd.utils.console import console
from kd.utils.files import write_json, write_text

# Allowed difference of a float32 file's logits from torch's, which sums in another order, as a share of the largest.
# If a network rounds its activations, a last bit may decide on a whole step: then only the mean difference is limited.
TOLERANCE = 1e-4
MEAN_TOLERANCE = 0.02


class Written(NamedTuple):
    differences: dict[str, float]  # of each float32 file's logits from torch's, by file name
    int8: Quantized | None


def write_export(
    folder: Path,
    source: ExportedRun,
    data: Data | None,
    calibration: UInt8[np.ndarray, "n 3 h w"] | None,
    args: argparse.Namespace,
) -> None:
    """Fill the empty `folder` with what `args`, the flags of kd.export, ask for.

    `data` is for the table; `calibration` holds the images that set int8's ranges.
    Raises: UserError if a format cannot be written.
    """
    expects = describe(source.info)
    write_json(folder / "preprocessing.json", expects)
    summary, config = copy_run(source, folder)
    written = write_formats(folder, source, set(args.formats), calibration, args.min_agreement)
    table = _write_table(folder, source, data, written, args) if args.table else _notes_alone(written, args)
    onnx_files = sorted((path.name for path in folder.glob("*.onnx")), reverse=True)
    content = CardContent(summary, config, control_summary(source), expects, onnx_files, table)
    write_card(folder / "README.md", content, args.license, args.push)


def calibration_images(source: ExportedRun, data: Data, count: int) -> UInt8[np.ndarray, "n 3 h w"]:
    """`count` unaugmented training images in a fixed random choice; never validation or test images."""
    chosen = rng.order(0, 0, len(data.train.labels))[:count].sort().values  # sorted: a stream reads rows in its order
    return torch.cat(list(iter_centre_crops(data.train, data.size, chosen, scoring_batch(source, data)))).numpy()


def write_formats(
    folder: Path,
    source: ExportedRun,
    formats: set[str],
    calibration: UInt8[np.ndarray, "n 3 h w"] | None,
    min_agreement: float,
) -> Written:
    """Write the graph formats.

    Int8 aims at half the wrong predictions that `min_agreement` allows: its calibration images are training images, and
    it does less well on others.
    Raises: UserError if the network cannot be exported or a file's logits differ from torch's.
    """
    if formats <= {"safetensors"}:
        return Written({}, None)
    program, expects, differences = trace(source.network, source.info["model"]), describe(source.info), {}
    compare = partial(compare_with_torch, source, rounds_activations(program))
    quantized = None
    onnx, int8, pt2 = (folder / name for name in ("model.onnx", "model.int8.onnx", "model.pt2"))
    if {"onnx", "int8"} & formats:  # int8 is quantised from the float32 file
        print("writing model.onnx", flush=True)
        write_onnx(program, onnx, expects)
        differences["model.onnx"] = compare("model.onnx", OnnxFile(onnx))
    if "int8" in formats:
        print(f"writing model.int8.onnx, its ranges from {len(calibration)} training images", flush=True)
        quantized = write_int8(onnx, int8, calibration, expects, (100 + min_agreement) / 2)
        OnnxFile(int8)  # it must open
        print(f"  {quantized.note(int8.name)}", flush=True)
    if "model.onnx" in differences and "onnx" not in formats:
        onnx.unlink()
        del differences["model.onnx"]
    if "pt2" in formats:
        print("writing model.pt2", flush=True)
        with errors_as_messages(pt2.name):
            write_pt2(program, pt2, expects)
            opened = open_pt2(pt2)
        differences["model.pt2"] = compare("model.pt2", torch_classifier(opened)(0))
    return Written(differences, quantized)


def compare_with_torch(source: ExportedRun, rounding: bool, name: str, classify: Classifier) -> float:
    """The largest difference of logits or embeddings from torch on random pixels, in batches of 1 and 7.

    Raises: UserError if it exceeds what another order of summation explains.
    """
    generator, differences, scale, cosine = np.random.default_rng(0), [], 1.0, 1.0
    what = "logits" if source.info["classes"] else "embeddings"
    for count in (1, 7):
        images = generator.integers(0, 256, (count, 3, *source.info["image_size"]), dtype=np.uint8)
        with torch.no_grad():
            expected = source.network(torch.from_numpy(images)).numpy()
        answers = classify(images)
        lengths = np.linalg.norm(answers, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = min(cosine, float(((answers * expected).sum(axis=1) / np.maximum(lengths, 1e-12)).min()))
        differences.append(np.abs(answers - expected).ravel())
        scale = max(scale, float(np.abs(expected).max()))
    difference = np.concatenate(differences)
    largest = float(difference.max())
    close = difference.mean() <= MEAN_TOLERANCE * scale if rounding else largest <= TOLERANCE * scale
    require(
        bool(close),
        f"{name}: its {what} differ from torch's by up to {largest:.2g} (largest value: {scale:.2g}); nothing was"
        " written; leave that format out of --formats",
    )
    print(f"  {what} differ from torch's by at most {largest:.1e} on random pixels", flush=True)
    if what == "embeddings":  # there is no prediction to agree on
        print(f"  embeddings have a cosine similarity of at least {cosine:.7f} to torch's", flush=True)
    return largest


def check_agreement(name: str, agreement: float, images: str, minimum: float) -> tuple[str, ...]:
    """The warning that a file deserves which predicts much otherwise than the network, printed too.

    Raises: UserError if it agrees with the network on less than `minimum` percent of the images.
    """
    share = f"it agrees with the network on {agreement:.2f}% of {images}"
    kind = next(kind for kind, file in FILES.items() if file == name)
    require(
        agreement >= minimum,
        f"{name}: {share}, and --min-agreement is {minimum:g}; nothing was written; leave {kind} out of --formats, or"
        f" give --min-agreement {int(agreement)} to keep it" + " with a warning" * (agreement < MIN_AGREEMENT),
    )
    if agreement >= MIN_AGREEMENT:
        return ()
    warning = f"{name} predicts otherwise than the network: {share} (at least {MIN_AGREEMENT:g}% are usual)."
    print(f"warning: {warning}", file=sys.stderr, flush=True)
    return (f"WARNING: {warning}",)


def _notes_alone(written: Written, args: argparse.Namespace) -> list[Block]:
    """What is known about the int8 file without a table: how it was made, and its agreement on training images."""
    if written.int8 is None:
        return []
    name, images = FILES["int8"], f"the {written.int8.images} training images that set its ranges"
    warnings = check_agreement(name, written.int8.agreement, images, args.min_agreement)
    return [Lines((*warnings, written.int8.note(name)))]


def _write_table(
    folder: Path, source: ExportedRun, data: Data, written: Written, args: argparse.Namespace
) -> list[Block]:
    """Measure every file in `folder`, write export.json and export.md, and print the table.

    Raises: UserError if a file agrees with the network on too few test images.
    """
    to_measure, notes = candidates(folder, source, data, args.trust_code)
    rows = measure_files(to_measure, data, args.threads, scoring_batch(source, data))
    machine = describe_machine(args.threads)
    images, files = f"the {len(data.test.labels)} test images", [row for row in rows if row["name"] in FILES.values()]
    warnings = [check_agreement(row["name"], row["agreement"], images, args.min_agreement) for row in files]
    quantized = () if written.int8 is None else (written.int8.note(FILES["int8"]),)
    notes = (*sum(warnings, ()), *format_verdicts(rows, source.summary), *quantized, *notes)
    blocks = [format_table(rows, machine, len(data.test.labels)), Lines(notes)]
    numbers = {"rows": rows, "machine": machine, "threads": args.threads, "test_images": len(data.test.labels)}
    if "int8" in args.formats:
        numbers["calibration_images"] = written.int8.images
        numbers["int8"] = written.int8._asdict()
    numbers |= {"differences_on_random_pixels": written.differences, "notes": notes}
    write_json(folder / "export.json", numbers)
    text = markdown([Heading(1, "What was exported"), *blocks])
    write_text(folder / "export.md", text)
    wide = console if console.is_terminal else Console(width=160)
    for block in blocks:
        block.show(wide)
    return blocks
