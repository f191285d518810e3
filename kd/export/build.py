"""The formats a network is exported to: each written, loaded back and compared with torch."""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console

from kd.data import Data
from kd.data.rows import iter_centre_crops
from kd.errors import require
from kd.export.card import Subject, write_card
from kd.export.deployed import open_pt2, rounds, trace, write_pt2
from kd.export.measure import CHUNK, Answer, candidates, format_table, format_verdicts, measure_files, of_torch
from kd.export.onnx_files import write_int8, write_onnx
from kd.export.onnx_runtime import OnnxFile, describe
from kd.export.source import ExportedRun, alone, copy_run
from kd.models.cost import describe_machine
from kd.report.document import Block, Heading, Lines, markdown
from kd.utils import rng
from kd.utils.console import console
from kd.utils.files import write_atomically, write_json

FILES = {"safetensors": "model.safetensors", "onnx": "model.onnx", "int8": "model.int8.onnx", "pt2": "model.pt2"}


# Share of the largest logit by which a float32 file may differ from torch, which sums in another order: each logit, or
# the mean where the network rounds what it passes on, and a last bit may make a whole step.
CLOSE, CLOSE_ON_AVERAGE = 1e-4, 0.02


def make_files(
    folder: Path, source: ExportedRun, formats: set[str], calibration: UInt8[np.ndarray, "n 3 h w"] | None
) -> dict:
    """Write the formats asked for; returns, by file, the largest difference of a logit from torch's.

    `calibration`: the images that int8's ranges are taken from.
    Raises: UserError where the network cannot be exported, or a file does not say what the network says.
    """
    if formats <= {"safetensors"}:
        return {}
    program, expects, differences = trace(source.network, source.info["model"]), describe(source.info), {}
    alike = partial(compare, source, rounds(program))
    paths = {key: folder / name for key, name in FILES.items()}
    if {"onnx", "int8"} & formats:
        print("writing model.onnx", flush=True)
        write_onnx(program, paths["onnx"], expects)
        differences["model.onnx"] = alike("model.onnx", OnnxFile(paths["onnx"]))
    if "int8" in formats:
        print(f"writing model.int8.onnx, its ranges from {len(calibration)} training images", flush=True)
        write_int8(paths["onnx"], paths["int8"], calibration, expects)
        OnnxFile(paths["int8"])  # it opens; how good it is, the table says
    if "int8" in formats and "onnx" not in formats:  # it was on the way
        paths["onnx"].unlink()
        del differences["model.onnx"]
    if "pt2" in formats:
        print("writing model.pt2", flush=True)
        write_pt2(program, paths["pt2"], expects)
        differences["model.pt2"] = alike("model.pt2", of_torch(open_pt2(paths["pt2"]))(0))
    return differences


def calibration_images(data: Data, count: int) -> UInt8[np.ndarray, "n 3 h w"]:
    """`count` training images of a fixed random order, unaugmented; validation and test images set no range."""
    chosen = rng.order(0, 0, len(data.train.labels))[:count].sort().values  # a stream reads them in its own order
    return torch.cat(list(iter_centre_crops(data.train, data.size, chosen, CHUNK))).numpy()


def compare(source: ExportedRun, rounding: bool, name: str, answer: Answer) -> float:
    """The largest difference of a logit from torch's on random pixels, in batches of 1 and 7. Raises UserError where it
    is more than another order of sums makes."""
    rng, differences, scale = np.random.default_rng(0), [], 1.0
    for count in (1, 7):
        images = rng.integers(0, 256, (count, 3, *source.info["image_size"]), dtype=np.uint8)
        with torch.no_grad():
            theirs = source.network(torch.from_numpy(images)).numpy()
        differences.append(np.abs(answer(images) - theirs).ravel())
        scale = max(scale, float(np.abs(theirs).max()))
    each = np.concatenate(differences)
    largest = float(each.max())
    alike = each.mean() <= CLOSE_ON_AVERAGE * scale if rounding else largest <= CLOSE * scale
    require(
        bool(alike),
        f"{name} does not say what the network says: logits differ by up to {largest:.2g}, the largest is {scale:.2g};"
        " nothing was written; leave that format out of --formats",
    )
    print(f"  logits differ from torch's by at most {largest:.1e} on random pixels", flush=True)
    return largest


#: (kd.shipping.contents) Every file of an export, into an empty folder.


def fill(
    folder: Path,
    source: ExportedRun,
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
    folder: Path, source: ExportedRun, data: Data, differences: dict[str, float], given: argparse.Namespace
) -> list[Block]:
    """Measure every file in `folder`; export.json and export.md are written, and the same shown."""
    listed, notes = candidates(folder, source, data, given.trust_code)
    rows = measure_files(listed, data, given.threads)
    where = describe_machine(given.threads)
    notes = (*format_verdicts(rows, source.summary), *notes)
    blocks = [format_table(rows, where, len(data.test.labels)), Lines(notes)]
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


#: (kd.shipping) What kd/export.py and kd/predict.py are made of: files in other formats, their runtimes, and what they cost.
