"""Class names for image files, by a trained network.

    python -m kd.predict RUN photo.jpg more/ --top 3         a run folder, or what kd.export made of it
    python -m kd.predict USER/NAME photo.jpg                 a network on the Hub
    python -m kd.predict RUN/export/model.int8.onnx more/    an exported file, without torch or the network's code

Images of any kind and size are brought to the network's own, as its training images were. One line an image; a file
that is no image is named at the end, with exit code 2, and the others are predicted all the same.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from rich.progress import track

from kd.errors import UserError, exit_code, require
from kd.export.onnx_runtime import describe
from kd.utils.images import preprocess

BATCH = 64  # images in memory at once


class Predictor(NamedTuple):
    answer: Callable[[np.ndarray], np.ndarray]  # uint8 pixels b x 3 x h x w -> logits b x k
    image_size: tuple[int, int]  # height, width
    stored_size: int | None
    classes: list[str]


class Prediction(NamedTuple):
    path: Path
    best: list[tuple[str, float]]  # class and probability, the likeliest first
    error: str | None = None  # why there are none


def open_predictor(name: str, trust_code: bool = False) -> Predictor:
    """The network of a run folder, a Hub id or an exported .onnx file. Raises UserError where there is none."""
    if name.lower().endswith(".onnx"):
        from kd.export.onnx_runtime import OnnxFile

        require(Path(name).is_file(), f"{name}: no such file; python -m kd.export RUN --formats onnx makes one")
        answer = OnnxFile(Path(name))
        expects = answer.preprocessing
    else:
        from kd.export.deployed import Deployed
        from kd.export.measure import of_torch
        from kd.runs.load import load_network
        from kd.utils.hub import local_folder

        trained = load_network(local_folder(name), trust_code)
        answer, expects = of_torch(Deployed(trained.network, trained.info))(0), describe(trained.info)
    return Predictor(answer, tuple(expects["image_size"]), expects.get("stored_size"), expects["classes"])


def find_images(names: list[str]) -> list[Path]:
    """Files as they are named; of a folder, all below it whose names end like an image's, in order.

    Raises: UserError for a name that is not there, or a folder without images.
    """
    found, endings = [], set(Image.registered_extensions())
    for name in names:
        path = Path(name)
        require(path.exists(), f"{name}: no such file or folder")
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
            require(bool(inside), f"{name}: no file below it is named like an image")
        found += inside
    return found


def predict(predictor: Predictor, paths: list[Path], top: int) -> Iterator[Prediction]:
    """The `top` likeliest classes of each image, in order; for one that cannot be read, why."""
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        read = [_read(path, predictor) for path in batch]  # a path may be there twice
        images = [image for image in read if not isinstance(image, str)]
        shares = iter(_softmax(predictor.answer(np.stack(images))) if images else ())
        for path, image in zip(batch, read, strict=True):
            if isinstance(image, str):
                yield Prediction(path, [], image)
            else:
                share = next(shares)
                best = np.argsort(-share, kind="stable")[:top]
                yield Prediction(path, [(predictor.classes[number], float(share[number])) for number in best])


def _read(path: Path, predictor: Predictor) -> np.ndarray | str:
    """Pixels, or in words why there are none."""
    try:
        return preprocess(path, predictor.image_size, predictor.stored_size)
    except Exception as error:  # Pillow raises many kinds; whatever it is, the file is at fault
        return " ".join(str(error).split()) or type(error).__name__


def _softmax(logits: Float[np.ndarray, "b k"]) -> Float[np.ndarray, "b k"]:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _as_json(prediction: Prediction) -> dict:
    best = [{"class": name, "probability": share} for name, share in prediction.best]
    said = {"error": prediction.error} if prediction.error else {"predictions": best}
    return {"image": str(prediction.path)} | said


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m kd.predict", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN", help="a run folder, a Hub id, or an exported .onnx file")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=1, help="how many classes of each image (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    parser.add_argument("--trust-code", action="store_true", help="build a network that is a module:function")
    given = parser.parse_args(args)
    require(given.top >= 1, f"--top {given.top}: give 1 or more")
    paths = find_images(given.images)
    predictor = open_predictor(given.run, given.trust_code)
    aside = Console(stderr=True)
    bar = track(predict(predictor, paths, given.top), "predicting", len(paths), console=aside, transient=True,
                disable=not aside.is_terminal)  # fmt: skip
    done = []
    for one in bar:
        done.append(one)
        if not given.json and not one.error:
            print(f"{one.path}: {', '.join(f'{name} {100 * share:.2f}%' for name, share in one.best)}", flush=True)
    if given.json:
        print(json.dumps([_as_json(one) for one in done], indent=2))
    wrong = [f"{one.path} ({one.error})" for one in done if one.error]
    if wrong:
        raise UserError(f"no image that can be read: {'; '.join(wrong)}")


if __name__ == "__main__":
    sys.exit(exit_code(main, "what is printed stands; the same command starts again"))
