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
        self.preprocessing = json.loads(words)

    def __call__(self, images: UInt8[np.ndarray, "b 3 h w"]) -> Float[np.ndarray, "b k"]:
        (logits,) = self._session.run(["logits"], {"images": images})
        return logits


def needed(module: str):
    """An optional module of the extra `export`. Raises UserError saying how to get it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is needed for this: pip install -e '.[export]' ({error})") from error
