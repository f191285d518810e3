"""The formats a network is exported to: each written, loaded back and compared with torch."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from kd import views
from kd.data import Data
from kd.errors import require
from kd.images.rows import centred
from kd.shipping.deploy import open_pt2, rounds, trace, write_pt2
from kd.shipping.onnx_files import write_int8, write_onnx
from kd.shipping.onnx_runtime import OnnxFile
from kd.shipping.preprocess import describe
from kd.shipping.shipped import CHUNK, Answer, of_torch
from kd.shipping.source import Source

FILES = {"safetensors": "model.safetensors", "onnx": "model.onnx", "int8": "model.int8.onnx", "pt2": "model.pt2"}
# Share of the largest logit by which a float32 file may differ from torch, which sums in another order: each logit, or
# the mean where the network rounds what it passes on, and a last bit may make a whole step.
CLOSE, CLOSE_ON_AVERAGE = 1e-4, 0.02


def make_files(
    folder: Path, source: Source, formats: set[str], calibration: UInt8[np.ndarray, "n 3 h w"] | None
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
    chosen = views.order(0, 0, len(data.train.labels))[:count].sort().values  # a stream reads them in its own order
    return torch.cat(list(centred(data.train, data.size, chosen, CHUNK))).numpy()


def compare(source: Source, rounding: bool, name: str, answer: Answer) -> float:
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
