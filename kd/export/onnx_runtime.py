"""An exported ONNX file, run by onnxruntime: one file is enough, and neither torch nor the network's code is needed."""

import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from kd.errors import UserError, require

KEY = "preprocessing"  # of the metadata that the file carries


class OnnxFile:
    """Takes pixels and gives logits; `preprocessing` is what kd.shipping.preprocess.describe said of it.

    Raises: UserError where onnxruntime is not there, or the file is none that kd.export wrote.
    """

    def __init__(self, path: Path, threads: int = 0):
        onnxruntime = needed("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0: as many as there are cores
        options.log_severity_level = 3  # errors
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has an exception of its own for each thing that may be wrong
            raise UserError(f"{path} cannot be opened ({' '.join(str(error).split())[:200]})") from error
        words = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        require(words is not None, f"{path} does not say what it expects; give a file that kd.export wrote")
        shapes = {value.name: value.shape for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        try:
            self.preprocessing = json.loads(words)
            sound = _fits(self.preprocessing, shapes)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            sound = False
        require(sound, f"{path} says it expects {words[:100]}, which is not its network's; give a file of kd.export's")

    def __call__(self, images: UInt8[np.ndarray, "b 3 h w"]) -> Float[np.ndarray, "b k"]:
        (logits,) = self._session.run(["logits"], {"images": images})
        return logits


def _fits(expects: dict, shapes: dict[str, list]) -> bool:
    """Whether what a file says of itself is what kd.export writes, and of this very network.

    `shapes`: of its inputs and outputs, by name. Raises whatever JSON of another shape leads to.
    """
    (height, width), classes, stored = expects["image_size"], expects["classes"], expects.get("stored_size")
    whole = all(type(side) is int for side in (height, width, height if stored is None else stored))
    (_, count), named = shapes["logits"], all(isinstance(name, str) for name in classes)
    counted = not isinstance(count, int) or count == len(classes)  # of some networks it is computed
    larger = stored is None or stored >= max(height, width)
    return shapes["images"][1:] == [3, height, width] and whole and larger and named and counted


def needed(module: str):
    """An optional module of the extra `export`. Raises UserError saying how to get it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is needed for this: pip install -e '.[export]' ({error})") from error


#: (kd.shipping.preprocess) What a network expects of an image, in words and numbers that go with every exported file.


RULE = "upright by its EXIF tag, RGB, the largest part around the centre with the shape of the network's images"


RULE += ", brought to that size (bicubic)"


def describe(info: dict) -> dict:
    """What a file made from a run expects and gives, from the run's model.json; as JSON it goes with every file."""
    (height, width), stored = info["image_size"], info.get("stored_size")
    return {
        "input": "images",
        "dtype": "uint8",
        "shape": ["batch", 3, height, width],
        "colours": "RGB",
        "range": [0, 255],
        "image": RULE if stored is None else f"{RULE}: first to {stored} x {stored}, whose centre is cut out",
        "image_size": [height, width],
        "stored_size": stored,
        "mean": list(info["mean"]),
        "std": list(info["std"]),
        "normalisation": "(pixel / 255 - mean) / std, which the .onnx and .pt2 files do themselves; the network that"
        " kd.load builds from model.safetensors takes images already normalised",
        "output": "logits",
        "classes": list(info["classes"]),
    }
