"""Draw what a network sees of a few training images.

    python -m kd.data.show views.png                                        CIFAR-100 as --preset report augments it
    python -m kd.data.show --data photos --policy trivial --erase 0.2 views.png
    python -m kd.data.show --preset patient --epochs 10 --mix-off-epochs 2 views.png
    python -m kd.data.show --config runs/x/config.json --epochs 8 views.png     the images of that run

Each row is one image: as it is scored, then its view in each epoch of a run of --epochs epochs, mixed and erased as the
network sees it. These are the very views of a training run with the same flags and --seed.
"""

import io
import shlex
import sys
import textwrap
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from tyro.conf import Positional

from kd.config import DataConfig, FitConfig, ViewConfig
from kd.config.cli import parse
from kd.config.jobs import PresetName, check_together
from kd.config.presets import PRESETS
from kd.data.columns import UNLABELLED
from kd.data.dataset import Data, load_data
from kd.data.loader import Pixels, TrainingImages
from kd.errors import UserError, exit_code, require
from kd.types import Mix
from kd.utils.console import shorten

CELL = 1.1  # inches of a picture's longer side
DOTS = 150  # per inch
SMALL = 7  # points of the letters beside the pictures
LETTERS = 15  # of a class's name, which the side of a picture has room for


@dataclass(frozen=True)
class ShowConfig:
    picture: Positional[Path | None] = None
    """The PNG to write."""
    preset: PresetName = "report"
    """Sets the defaults, as for the scripts."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    images: int = 6
    """Rows: training images."""
    epochs: int = 8
    """Columns: epochs of the run."""
    seed: int = 0
    """Seed of the views."""

    def check(self) -> None:
        self.data.check()
        self.views.check()
        for name in ("images", "epochs"):
            value = getattr(self, name)
            require(1 <= value <= 40, f"--{name} {value}: give 1 to 40")
        check_together(self.data, self.views, FitConfig(epochs=self.epochs))
        require(
            self.picture is not None, "no picture is named: end the command with a file to write, such as views.png"
        )
        require(self.picture.suffix.lower() == ".png", f"{self.picture}: is no PNG; name a file that ends in .png")
        folder = self.picture.parent
        require(folder.is_dir(), f"{self.picture}: there is no folder {folder}; make it, or name another")


class Column(NamedTuple):
    """One picture of each image."""

    title: str
    pixels: UInt8[Tensor, "b h w 3"]
    notes: tuple[str, ...]  # below each picture


def defaults(preset: str) -> ShowConfig:
    recipe = PRESETS[preset]
    return ShowConfig(preset=preset, **{part: recipe[part] for part in ("data", "views") if part in recipe})


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    config = parse(defaults, __doc__, argv)
    data = load_data(config.data)
    rows = len(data.train.labels)
    require(config.images <= rows, f"--images {config.images}: the training split has {rows}; give fewer")
    index = data.train.sample(config.images)
    words = [word for word in argv if word != str(config.picture)]
    names = [name_of(label, data.classes) for label in data.train.labels[index].tolist()]
    png = draw(columns(config, data, index), names, shlex.join(words) or f"--preset {config.preset}")
    try:
        config.picture.write_bytes(png)
    except OSError as error:
        raise UserError(f"{config.picture}: cannot be written ({error.strerror}); name another file") from error
    print(f"{config.picture}: {config.images} images, {config.epochs} epochs")


def columns(config: ShowConfig, data: Data, index: Tensor) -> list[Column]:
    """The samples `index` as they are scored, then as they are seen in each epoch."""
    images = TrainingImages(data, config.views, config.seed, torch.device("cpu"), config.epochs)
    found = [Column("as scored", pixels_of(next(images.centre_crops([index])), images), ("",) * len(index))]
    for epoch in range(config.epochs):
        number = config.views.number(epoch, config.epochs)
        image, _, mixed, *_ = next(images.augmented([index], number))
        title = f"epoch {epoch}" + (f", view {number}" if config.views.count else "")
        found.append(Column(title, pixels_of(image, images), notes_of(mixed, len(index), data.classes)))
    return found


def pixels_of(images: Tensor, source: Pixels) -> UInt8[Tensor, "b h w 3"]:
    """Normalised images b x 3 x h x w as pixels again."""
    shares = images * source.std[:, None, None] + source.mean[:, None, None]
    return (255 * shares).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def notes_of(mixed: Mix | None, count: int, classes: tuple[str, ...]) -> tuple[str, ...]:
    """How much of another class is mixed into each image."""
    if mixed is None:
        return ("",) * count
    shares = (1 - mixed.weight).tolist()
    return tuple(f"{share:.0%} {named(name_of(label, classes))}" for label, share in zip(mixed.label.tolist(), shares))


def name_of(label: int, classes: tuple[str, ...]) -> str:
    """The name of a class; of an image without a label that it is one."""
    return "another image" if label == UNLABELLED else classes[label]


def named(text: str) -> str:
    """A class's name, short, and without what matplotlib takes for mathematics."""
    return shorten(text, LETTERS).replace("$", r"\$")


def draw(shown: list[Column], names: list[str], caption: str) -> bytes:
    """The PNG of a grid of pictures, a row for each of `names`, with a caption."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = shown[0].pixels.shape[1:3]
    scale = CELL / max(height, width)
    inches = len(shown) * (scale * width + 0.12), len(names) * (scale * height + 0.24)
    lines = textwrap.wrap(caption.replace("$", r"\$"), max(30, int(14 * inches[0])))
    figure = Figure(figsize=(inches[0] + 0.3, inches[1] + 0.5 + 0.16 * len(lines)), dpi=DOTS, layout="constrained")
    grid = figure.subplots(len(names), len(shown), squeeze=False)
    for column, (title, pixels, notes) in enumerate(shown):
        grid[0, column].set_title(title, fontsize=SMALL + 1)
        for row, (picture, note) in enumerate(zip(pixels.numpy(), notes)):
            axes = grid[row, column]
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(note, fontsize=SMALL, labelpad=2)
    for row, name in enumerate(names):
        grid[row, 0].set_ylabel(named(name), fontsize=SMALL)
    figure.suptitle("\n".join(lines), fontsize=SMALL + 1)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in a script the font lacks
        FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(exit_code(main, "the same command starts over"))
