"""Run exported ONNX files with onnxruntime, and describe what they expect; needs neither torch nor the model code."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Float, UInt8

from kd.errors import UserError, require
from kd.utils.console import one_line

METADATA_KEY = "preprocessing"  # what describe() returns, as JSON in the file's metadata

CROPPING_RULE = (
    "upright by its EXIF tag, RGB, the largest part around the centre with the shape of the network's images"
    ", brought to that size (bicubic)"
)


class OnnxFile:
    """A callable from pixels to logits, or to an embedder's embeddings.

    `preprocessing` is the output of describe() stored in the file.

    Raises: UserError if onnxruntime is missing or kd.export did not write the file.
    """

    def __init__(self, path: Path, threads: int = 0):
        onnxruntime = import_extra("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0: as many as there are cores
        options.log_severity_level = 3  # errors
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a separate exception for each cause
            short = one_line(error)
            raise UserError(f"{path}: cannot be opened ({short}); give a file that kd.export wrote") from error
        text = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        require(text is not None, f"{path}: has no preprocessing metadata; give a file that kd.export wrote")
        shapes = {value.name: value.shape for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        try:
            self.preprocessing = json.loads(text)
            valid = _fits_network(self.preprocessing, shapes)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            valid = False
        require(
            valid,
            f"{path}: its preprocessing metadata does not fit its network ({text[:100]}); give a file that kd.export"
            " wrote",
        )

    def __call__(self, images: UInt8[np.ndarray, "b 3 h w"]) -> Float[np.ndarray, "b k"]:
        (answers,) = self._session.run([_output(self.preprocessing)], {"images": images})
        return answers


def _output(expects: dict) -> str:
    return expects.get("output", "logits")


def _fits_network(expects: dict, shapes: dict[str, list]) -> bool:
    """Whether the metadata `expects` is well formed and fits the `shapes` of the network's inputs and outputs.

    Raises TypeError, KeyError and the like if its JSON has another structure.
    """
    (height, width), classes, stored = expects["image_size"], expects["classes"], expects.get("stored_size")
    integers = all(type(side) is int for side in (height, width, height if stored is None else stored))
    (_, count), names = shapes[_output(expects)], all(isinstance(name, str) for name in classes)
    same_count = not isinstance(count, int) or count == expects.get(
        "embedding", len(classes)
    )  # symbolic in some graphs
    large_enough = stored is None or stored >= max(height, width)
    return shapes["images"][1:] == [3, height, width] and integers and large_enough and names and same_count


def describe(info: dict) -> dict:
    """The input and output of files made from a run, given its model.json; stored as JSON with every file."""
    (height, width), stored = info["image_size"], info.get("stored_size")
    rule = CROPPING_RULE
    if stored is not None:
        rule = f"{CROPPING_RULE}: first to {stored} x {stored}, whose centre is cut out"
    return {
        "input": "images",
        "dtype": "uint8",
        "shape": ["batch", 3, height, width],
        "colours": "RGB",
        "range": [0, 255],
        "image": rule,
        "image_size": [height, width],
        "stored_size": stored,
        "mean": list(info["mean"]),
        "std": list(info["std"]),
        "normalisation": "(pixel / 255 - mean) / std, which the .onnx and .pt2 files do themselves; the network that"
        " kd.load builds from model.safetensors takes images already normalised",
        "output": "logits" if info["classes"] else "embedding",
        "classes": list(info["classes"]),
    } | ({} if info["classes"] else {"embedding": info["embedding"]})


def import_extra(module: str) -> ModuleType:
    """Import an optional module of the extra `export`. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed: pip install -e '.[export]' ({error})") from error
