"""Predict class names for image files with a trained network.

    python -m kd.predict RUN photo.jpg more/ --top 3         a run folder, or its export
    python -m kd.predict USER/NAME photo.jpg                 a network on the Hub
    python -m kd.predict RUN/export/model.int8.onnx more/    an exported file, without torch or the model code

Images of any mode and size are prepared as the training images were. Prints one line per image.
Of a folder, files without an image suffix are left out, and counted on stderr. Files that cannot
be read as images are listed at the end, with exit code 2; all others are still predicted.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from rich.progress import track

from kd.errors import UserError, exit_code, require
from kd.export.onnx_runtime import OnnxFile, describe
from kd.utils.console import print_once
from kd.utils.images import preprocess

BATCH = 64
NO_CLASSES = (
    "is an embedder and predicts no classes; kd.load(RUN).embedding(images) gives its embeddings, and"
    " train_teacher.py --init RUN trains a classifier from it"
)


class Predictor(NamedTuple):
    classify: Callable[[np.ndarray], np.ndarray]  # uint8 pixels b x 3 x h x w -> logits b x k
    image_size: tuple[int, int]  # height, width
    stored_size: int | None
    classes: list[str]


class Classifier:
    """What kd.load gives a trained network beside its own: class names, and the way from an image to its input."""

    def __init__(self, network, info: dict):
        """`network` is the torch module, `info` its model.json."""
        self.network, self.classes, self._model = network, tuple(info["classes"]), info.get("model", "")
        self._size, self._stored_size = tuple(info["image_size"]), info.get("stored_size")
        self._mean, self._std = info["mean"], info["std"]

    def predict(self, images, top: int = 1) -> list:
        """The `top` likeliest classes with their probabilities, likeliest first: [("cat", 0.9), ("dog", 0.1)].

        `images` is a file's path, a PIL image, or pixels as uint8 (an array h x w x 3, a tensor 3 x h x w); for a list
        of these, or an array or tensor with one dimension more, the answer is a list with one such list for each.

        Raises: kd.errors.UserError for what is no image, and from an embedder, which knows no classes.
        """
        require(top >= 1, f"top {top}: give 1 or more")
        require(bool(self.classes), f"{self._model}: {NO_CLASSES}")
        found, alone = self._outputs(images, self.network)
        rows = found.numpy()
        best = [[(self.classes[index], share) for index, share in most_likely(row, top)] for row in rows]
        return best[0] if alone else best

    def embedding(self, images):
        """The images' embeddings, a float tensor n x width on the CPU; for one image alone of `width` numbers.

        An embedder's output; of a classifier what enters its last layer. `images` as for `predict`. Not normalised.
        Raises: kd.errors.UserError for what is no image, or a network whose embedding is unknown.
        """
        from kd.models import stages
        from kd.models.features import Tap

        if not self.classes:
            found, alone = self._outputs(images, self.network)
            return found[0] if alone else found
        layers = stages(self._model, self.network, len(self.classes)).embedding
        require(bool(layers), f"{self._model}: ends in no linear layer, so that its embedding is unknown")
        tap = Tap(self.network, layers)
        try:
            found, alone = self._outputs(images, lambda batch: next(iter(tap(batch).features.values())).flatten(1))
        finally:
            tap.remove()
        return found[0] if alone else found

    def _outputs(self, images, run):
        """`run`'s outputs for the images, in eval mode, as a float tensor on the CPU; and whether it was one alone."""
        import torch

        (pictures, alone), found = _as_list(images), []
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()
        try:
            for start in range(0, len(pictures), BATCH):
                batch = torch.stack([self._prepared(picture) for picture in pictures[start : start + BATCH]])
                with torch.no_grad():
                    found.append(run(self._moved(batch)).float().cpu())
        finally:
            for module, training in modes:
                module.training = training
        return torch.cat(found) if found else torch.empty(0, 0), alone

    def transform(self, image):
        """One image, as for `predict`, to the network's input: 3 x h x w, normalised, on the network's device."""
        return self._moved(self._prepared(image))

    def _prepared(self, image):
        """The image as a float32 tensor 3 x h x w on the CPU, normalised."""
        import torch

        from kd.data.rows import normalize

        picture = image if isinstance(image, str | Path) else _as_picture(image)
        try:
            pixels = preprocess(picture, self._size, self._stored_size)
        except Exception as error:  # Pillow raises many types; all of them mean that the image is bad
            raise UserError(f"{picture}: cannot be read as an image ({error})") from error
        return normalize(torch.from_numpy(pixels.copy())[None], torch.tensor(self._mean), torch.tensor(self._std))[0]

    def _moved(self, batch):
        """The batch on the device and in the precision of the network's weights."""
        weight = next((part for part in self.network.parameters() if part.is_floating_point()), batch)
        return batch.to(weight.device, weight.dtype)


def with_classes(network, info: dict, folder: Path):
    """`network` with what a Classifier gives it; a name that it has itself stays its own, and a line says so."""
    classifier = Classifier(network, info)
    given = {name: getattr(classifier, name) for name in ("predict", "embedding", "transform", "classes")}
    taken = sorted((given.keys() | {"folder"}) & set(dir(network)))
    for name, value in (given | {"folder": folder}).items():
        if name not in taken:
            setattr(network, name, value)
    if taken:
        print_once(f"{folder}: its network has a {', '.join(taken)} of its own, which kd.load leaves as it is")
    return network


def _as_list(images) -> tuple[list, bool]:
    """The images one by one, and whether only one was given."""
    import torch

    if isinstance(images, str | Path | Image.Image):
        return [images], True
    if isinstance(images, np.ndarray | torch.Tensor):
        return ([images], True) if images.ndim in (2, 3) else (list(images), False)
    require(
        isinstance(images, Iterable) and not isinstance(images, bytes | dict),
        f"{type(images).__name__}: is no image; give a path, a PIL image, uint8 pixels, or a list of them",
    )
    return list(images), False


def _as_picture(image) -> Image.Image:
    """A PIL image of one, or of pixels: an array h x w x 3, a tensor 3 x h x w, greys with 1 channel or none."""
    import torch

    if isinstance(image, Image.Image):
        return image
    said = f"{type(image).__name__} {tuple(getattr(image, 'shape', ()))} {getattr(image, 'dtype', '')}".strip()
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    fits = isinstance(image, np.ndarray) and image.dtype == np.uint8 and min(image.shape, default=0) > 0
    fits = fits and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3)))
    require(
        fits,
        f"{said}: is no image; give a path, a PIL image, or uint8 pixels (an array h x w x 3, a tensor 3 x h x w);"
        " normalised floats go into the network itself",
    )
    return Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image))


class Prediction(NamedTuple):
    path: Path
    best: list[tuple[str, float]]  # class and probability, most likely first
    error: str | None = None  # why the file cannot be read; `best` is then empty


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m kd.predict", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN", help="a run folder, a Hub id, or an exported .onnx file")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=1, help="classes to print per image (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON list to standard output")
    parser.add_argument("--trust-code", action="store_true", help="allow building a network given as module:function")
    args = parser.parse_args(argv)
    require(args.top >= 1, f"--top {args.top}: give 1 or more")
    paths = find_images(args.images)
    predictor = open_predictor(args.run, args.trust_code)
    stderr = Console(stderr=True)
    bar = track(predict(predictor, paths, args.top), "predicting", len(paths), console=stderr, transient=True,
                disable=not stderr.is_terminal)  # fmt: skip
    predictions = []
    for prediction in bar:
        predictions.append(prediction)
        if not args.json and not prediction.error:
            best = ", ".join(f"{name} {100 * probability:.2f}%" for name, probability in prediction.best)
            print(f"{prediction.path}: {best}", flush=True)
    if args.json:
        print(json.dumps([_as_json(prediction) for prediction in predictions], indent=2))
    unread = [f"{prediction.path} ({prediction.error})" for prediction in predictions if prediction.error]
    if unread:
        raise UserError(f"cannot be read as images: {'; '.join(unread)}; remove or replace them")


def find_images(names: list[str]) -> list[Path]:
    """Files as named; for a folder, all files below it that have an image suffix and are not hidden, sorted.

    Says on stderr what a folder has besides. Raises: UserError for a name that does not exist, or a folder without
    images.
    """
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    images, others = [], Counter()
    for name in names:
        path = Path(name)
        require(path.exists(), f"{name}: no such file or folder; name images, or folders of them")
        files = [path]
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.is_file()]
            found = [file for file in found if not any(part[0] == "." for part in file.relative_to(path).parts)]
            files = [file for file in found if file.suffix.lower() in suffixes]
            require(bool(files), f"{name}: no file in or below it has an image suffix (.png, .jpg, ...)")
            others.update(file.suffix.lower() for file in found if file.suffix.lower() not in suffixes)
        images += files
    if others:
        counts = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(others.items()))
        print(f"left out: {counts}; Pillow opens no such suffix here", file=sys.stderr, flush=True)
    return images


def open_predictor(name: str, trust_code: bool = False) -> Predictor:
    """Load the network of a run folder, a Hub id or an exported .onnx file. Raises UserError if there is none."""
    if name.lower().endswith(".onnx"):
        require(Path(name).is_file(), f"{name}: no such file; python -m kd.export RUN --formats onnx makes one")
        classify = OnnxFile(Path(name))
        expects = classify.preprocessing
        require(bool(expects["classes"]), f"{name}: is an embedder and predicts no classes")
    else:
        from kd.export.deployed import Deployed
        from kd.export.measure import torch_classifier
        from kd.runs.load import load_network
        from kd.utils.hub import local_folder

        trained = load_network(local_folder(name), trust_code)
        require(bool(trained.info["classes"]), f"{name}: {NO_CLASSES}")
        classify = torch_classifier(Deployed(trained.network, trained.info))(0)
        expects = describe(trained.info)
    return Predictor(classify, tuple(expects["image_size"]), expects.get("stored_size"), expects["classes"])


def predict(predictor: Predictor, paths: list[Path], top: int) -> Iterator[Prediction]:
    """The `top` most likely classes of each image, in order; or the error, if it cannot be read."""
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        loaded = [_read(path, predictor) for path in batch]  # a list, not a dict: a path may occur twice
        images = [image for image in loaded if not isinstance(image, str)]
        rows = iter(predictor.classify(np.stack(images)) if images else ())
        for path, image in zip(batch, loaded, strict=True):
            if isinstance(image, str):
                yield Prediction(path, [], image)
            else:
                best = most_likely(next(rows), top)
                yield Prediction(path, [(predictor.classes[index], probability) for index, probability in best])


def most_likely(logits: Float[np.ndarray, "k"], top: int) -> list[tuple[int, float]]:
    """The `top` most likely classes and their probabilities, ranked as kd.metrics.ranked does.

    By logit, not by probability: different logits may have equal probabilities, such as zero.
    """
    powers = np.exp(logits.astype(np.float64) - logits.max())
    best = np.argsort(-logits, kind="stable")[:top]
    return [(int(index), float(powers[index] / powers.sum())) for index in best]


def _read(path: Path, predictor: Predictor) -> np.ndarray | str:
    """The image's pixels, or an error message."""
    try:
        return preprocess(path, predictor.image_size, predictor.stored_size)
    except Exception as error:  # Pillow raises many types; all of them mean that the file is bad
        return " ".join(str(error).split()) or type(error).__name__


def _as_json(prediction: Prediction) -> dict:
    best = [{"class": name, "probability": probability} for name, probability in prediction.best]
    result = {"error": prediction.error} if prediction.error else {"predictions": best}
    return {"image": str(prediction.path)} | result


if __name__ == "__main__":
    sys.exit(exit_code(main, "the printed predictions are complete; the same command starts over"))
