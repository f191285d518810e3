"""TrivialAugment, RandAugment and AugMix of a whole batch, drawn as pure functions of (seed, number, sample index).

Operations, magnitudes and interpolation are torchvision's (transforms/v2/_auto_augment.py of 0.28). Its kernels change
all images of a batch by one magnitude, so a batch would take a call for each of 600 operations. Here a kernel takes a
magnitude for each image; `equalize`, which has none, is torchvision's own. A test compares every operation: results
differ by at most one level, except where an image is moved and a source position lies halfway between two pixels, of
which rounding chooses one.

All arithmetic is by element or exact, so that a sample's view does not depend on the rest of its batch.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kd.utils.constants import made_once
from kd.utils.operators import define_operators
from kd.utils.rng import random_below, random_uniform

PolicyName = Literal["none", "trivial", "rand", "augmix", "fixmatch"]

CHAINS = 3  # of operations in AugMix (torchvision's mixture_width)

DEPTH = 3  # most operations in a chain of AugMix

GREY = (2989, 5870, 1140)  # weights of red, green and blue in 1/10,000 (torchvision's rgb_to_grayscale)


class Policy(NamedTuple):
    """Which operations a sample is changed by."""

    name: PolicyName = "none"
    ops: int = 2  # operations one after another, of rand and fixmatch
    magnitude: int | None = None  # of rand: level, 0 to 30, 9 if left out; of augmix: severity, 1 to 10, 3 if left out

    @property
    def levels(self) -> range:
        """The levels of magnitude that it draws from."""
        if self.name == "rand":
            level = 9 if self.magnitude is None else self.magnitude
            return range(level, level + 1)
        if self.name == "augmix":
            return range(3 if self.magnitude is None else self.magnitude)
        return range(31)


class Ranges(NamedTuple):
    """How far a policy's operations go at the last level."""

    levels: int
    shear: float
    translate: Callable[[int], float]  # pixels, from the length of the image's side
    rotate: float  # degrees
    colour: float  # change of the factor of brightness, colour, contrast and sharpness, up and down; below 0: down only
    bits: tuple[int, int]  # posterize: bits kept at the first level, bits fewer at the last
    identity: bool  # whether leaving the image alone is an operation


RANGES = {
    "trivial": Ranges(31, 0.99, lambda side: 32.0, 135.0, 0.99, (8, 6), True),
    "rand": Ranges(31, 0.3, lambda side: 150.0 / 331.0 * side, 30.0, 0.9, (8, 4), True),
    "augmix": Ranges(10, 0.3, lambda side: side / 3.0, 30.0, 0.9, (4, 4), False),
    "fixmatch": Ranges(31, 0.3, lambda side: 0.3 * side, 30.0, -0.95, (8, 4), True),
}


class Change(NamedTuple):
    """An operation for each of some images."""

    drawn: Bool[Tensor, "n k"]  # by which of KERNELS
    values: Float[Tensor, "n 6"]  # a magnitude and five zeros; see Table


class Mean(NamedTuple):
    """The shares of an image and of its chains in their mean, of augmix."""

    own: Float[Tensor, "n"]
    chains: Float[Tensor, "n m"]


class PolicyDraws(NamedTuple):
    """What a policy draws for each image."""

    changes: tuple[Change, ...]  # one after another; of augmix for each of the images' CHAINS chains
    mean: Mean | None  # of augmix


def draw_policy(policy: Policy, size: tuple[int, int], index: Int[Tensor, "n"], seed: int, number: int) -> PolicyDraws:
    """What `policy` draws for view `number` of the samples `index`, of `size` (height, width).

    trivial: one operation of any strength (arXiv:2103.10158, the wide space). rand: `ops` operations of one strength
    (arXiv:1909.13719). augmix: a random mean of the image and three chains of one to three operations
    (arXiv:1912.02781, without its consistency loss). fixmatch: `ops` operations, each of any strength
    (arXiv:2001.07685, without its grey square: kd.data.augment.cut_out).
    """
    table = _table(policy, size, index.device)
    if policy.name == "augmix":
        return _draw_augmix(table, index, seed, number)
    steps = policy.ops if policy.name in ("rand", "fixmatch") else 1
    drawn = (_draw(table, index, seed, "policy", step, number) for step in range(steps))
    return PolicyDraws(tuple(table.change(operation) for operation in drawn), None)


def _draw_augmix(table: "Table", index: Int[Tensor, "n"], seed: int, number: int) -> PolicyDraws:
    draws = index[:, None] * CHAINS + torch.arange(CHAINS, device=index.device)
    depth = 1 + random_below(DEPTH, draws, seed, "augmix depth", number)
    drawn = (_draw(table, draws, seed, "augmix", step, number) for step in range(DEPTH))
    changes = tuple(table.change(torch.where(step < depth, each, table.identity)) for step, each in enumerate(drawn))
    own = random_uniform(index, seed, "augmix own", number)  # Beta(1, 1) is uniform
    # The gaps between two sorted uniform numbers have a Dirichlet(1, 1, 1) distribution.
    cuts = [random_uniform(index, seed, "augmix cut", cut, number) for cut in range(CHAINS - 1)]
    low, high = torch.minimum(*cuts), torch.maximum(*cuts)
    return PolicyDraws(changes, Mean(own, torch.stack([low, high - low, 1 - high], dim=1) * (1 - own)[:, None]))


def apply_policy(images: UInt8[Tensor, "b 3 h w"], drawn: PolicyDraws) -> UInt8[Tensor, "b 3 h w"]:
    """The images after what a policy drew for them.

    On a CPU each kernel runs on the rows that drew it. On a GPU each runs on all rows and its result is selected: about
    80 launches an operation, as many as on some rows, and the host never waits to learn which rows drew what.
    """
    if drawn.mean is not None:
        return _augmix(images, drawn)
    for change in drawn.changes:
        images = _change(images, change, "nearest")
    return images


def _augmix(images: UInt8[Tensor, "b 3 h w"], drawn: PolicyDraws) -> UInt8[Tensor, "b 3 h w"]:
    """Differs from torchvision: rounds the mean, so that the mean of equal images is that image."""
    changed = images.repeat_interleave(CHAINS, dim=0)
    for change in drawn.changes:
        changed = _change(changed, Change(*(part.flatten(0, 1) for part in change)), "bilinear")
    mean = images * drawn.mean.own[:, None, None, None]
    weighted = changed.unflatten(0, (-1, CHAINS)) * drawn.mean.chains[:, :, None, None, None]
    for chain in weighted.unbind(1):
        mean = mean + chain
    return mean.round().clamp(0, 255).to(torch.uint8)


def operations(policy: Policy, size: tuple[int, int]) -> list[tuple[str, float]]:
    """Every operation with its magnitude that a policy draws from, all equally likely, for images of `size`."""
    height, width = size
    ranges = RANGES[policy.name]
    rise = lambda last: torch.linspace(0.0, last, ranges.levels).tolist()  # noqa: E731
    bits, fewer = ranges.bits
    kept = (bits - torch.arange(ranges.levels) / ((ranges.levels - 1) / fewer)).round().tolist()
    signed = dict.fromkeys(("ShearX", "ShearY"), rise(ranges.shear))
    signed |= {"TranslateX": rise(ranges.translate(width)), "TranslateY": rise(ranges.translate(height))}
    signed |= {"Rotate": rise(ranges.rotate)}
    unsigned = {"Posterize": kept, "Solarize": torch.linspace(1.0, 0.0, ranges.levels).tolist()}
    colours = dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), rise(ranges.colour))
    signed, unsigned = (signed | colours, unsigned) if ranges.colour > 0 else (signed, unsigned | colours)
    unsigned |= dict.fromkeys(("AutoContrast", "Equalize", *(("Identity",) * ranges.identity)), [0.0] * ranges.levels)
    found = []
    for sign in (1, -1):
        found += [(name, sign * table[level]) for name, table in signed.items() for level in policy.levels]
        found += [(name, table[level]) for name, table in unsigned.items() for level in policy.levels]
    return found


class Table(NamedTuple):
    """A policy's operations on the device, the last of which leaves the image alone and is never drawn."""

    kernel: Int[Tensor, "e"]  # place in KERNELS
    values: Float[Tensor, "e 6"]  # the inverse affine matrix as `move` takes it, or a magnitude and what goes with it

    @property
    def identity(self) -> int:
        return len(self.kernel) - 1

    def change(self, drawn: Int[Tensor, "*n"]) -> Change:
        """The operations in the rows that were drawn."""
        places = torch.arange(len(KERNELS), device=drawn.device)
        return Change(self.kernel[drawn][..., None] == places, self.values[drawn])


def _draw(table: Table, index: Int[Tensor, "*n"], *words: int | str) -> Int[Tensor, "*n"]:
    """An operation for each sample, a row of the table."""
    return random_below(table.identity, index, *words)


@cache
def _table(policy: Policy, size: tuple[int, int], device: torch.device) -> Table:
    """Copied to the device once: a copy in every step would make the host wait."""
    rows = [_row(name, magnitude, size) for name, magnitude in [*operations(policy, size), ("Identity", 0.0)]]
    kernel = torch.tensor([list(KERNELS).index(name) for name, _ in rows], device=device)
    values = torch.tensor([values for _, values in rows], dtype=torch.float32, device=device)
    height, width = size
    # In half widths and half heights; divided here, on the device, so that each GPU rounds as it always did.
    moves = torch.cat([values[:, :3] / (0.5 * width), values[:, 3:] / (0.5 * height)], dim=1)
    return Table(kernel, torch.where((kernel == list(KERNELS).index("Move"))[:, None], moves, values))


def _row(name: str, magnitude: float, size: tuple[int, int]) -> tuple[str, list[float]]:
    """An operation's kernel and its values."""
    height, width = size
    angle = math.radians(-magnitude)
    moves = {
        "ShearX": [1, magnitude, magnitude * height / 2, 0, 1, 0],
        "ShearY": [1, 0, 0, magnitude, 1, magnitude * width / 2],
        "TranslateX": [1, 0, -int(magnitude), 0, 1, 0],
        "TranslateY": [1, 0, 0, 0, 1, -int(magnitude)],
        "Rotate": [math.cos(angle), math.sin(angle), 0, -math.sin(angle), math.cos(angle), 0],
    }
    if name in moves:
        return "Move", [float(entry) for entry in moves[name]]
    if name in BLENDS:
        return "Blend", [1 + magnitude, *BLENDS[name], *[0.0] * 3]
    value = {"Posterize": 256 - 2 ** (8 - int(magnitude)), "Solarize": 255 * magnitude}.get(name, 1 + magnitude)
    return name, [float(value), *[0.0] * 5]


def _change(images: UInt8[Tensor, "b 3 h w"], change: Change, interpolation: str) -> UInt8[Tensor, "b 3 h w"]:
    """Each image after the operation that it drew."""
    for place, (name, kernel) in enumerate(KERNELS.items()):
        if kernel is None:
            continue
        run = partial(kernel, interpolation=interpolation) if name == "Move" else kernel
        images = change_drawn(images, change.drawn[:, place], run, change.values)
    return images


def change_drawn(
    images: UInt8[Tensor, "b 3 h w"], drawn: Bool[Tensor, "b"], change: Callable, *parameters: Tensor
) -> UInt8[Tensor, "b 3 h w"]:
    """`change(images, *parameters)` in the rows that are `drawn`; each parameter has a row for each image.

    On a CPU only these rows are computed; on a GPU all, because its host would wait to learn which they are.
    """
    if not _by_rows(images):
        return torch.where(drawn[:, None, None, None], change(images, *parameters), images)
    rows = drawn.nonzero()[:, 0]
    if len(rows) == 0:
        return images
    return images.index_copy(0, rows, change(images[rows], *(parameter[rows] for parameter in parameters)))


def _by_rows(images: Tensor) -> bool:
    return images.device.type == "cpu"


def move(
    images: UInt8[Tensor, "b 3 h w"], values: Float[Tensor, "b 6"], interpolation: str
) -> UInt8[Tensor, "b 3 h w"]:
    """Fill each pixel from the position that an affine matrix gives, from the centre; black outside.

    `values`: the matrix, its first row divided by half of the width, its second by half of the height. Multiplied by
    element: a matrix product may run in TF32, which is off by pixels.
    """
    height, width = images.shape[2:]
    x, y = _from_centre(width, images.device), _from_centre(height, images.device)[:, None]
    by_x, by_y, shift = values.unflatten(1, (2, 3))[..., None, None].unbind(2)
    grid = (by_x * x + by_y * y + shift).permute(0, 2, 3, 1)
    moved = F.grid_sample(images.float(), grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    return moved.round().to(torch.uint8)


@made_once
def _from_centre(length: int, device: torch.device) -> Float[Tensor, "n"]:
    return torch.arange(length, device=device) - (length - 1) / 2


def grey(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Each pixel's brightness in whole levels, rounded down.

    Summed exactly in 1/10,000 of a level; the half keeps whole levels whole when they are divided.
    """
    red, green, blue = (images * _grey_weights(images.device)).split(1, dim=1)
    return ((red + green + blue + 0.5) / 10_000).floor()


@made_once
def _grey_weights(device: torch.device) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(GREY, dtype=torch.float32, device=device)[:, None, None]


def blend(images: UInt8[Tensor, "b 3 h w"], values: Float[Tensor, "b 6"]) -> UInt8[Tensor, "b 3 h w"]:
    """Towards, or away from, black, each pixel's grey or the image's mean grey: brightness, colour and contrast."""
    ratio, by_pixel, by_image = values[:, :3, None, None, None].unbind(1)
    greys = grey(images)
    levels = greys.long()  # integers: the rounding of a float sum depends on how threads split it
    mean = levels.sum(dim=(1, 2, 3), keepdim=True).float() / levels[0].numel()
    others = greys * by_pixel + mean * by_image  # one of the factors is 1 at most, the others are 0
    return (images * ratio + others * (1 - ratio)).clamp(0, 255).to(torch.uint8)


def _column(values: Float[Tensor, "b 6"]) -> Float[Tensor, "b 1 1 1"]:
    return values[:, 0, None, None, None]


def sharpness(images: UInt8[Tensor, "b 3 h w"], values: Float[Tensor, "b 6"]) -> UInt8[Tensor, "b 3 h w"]:
    """Away from, or towards, a blur of 3 x 3 pixels of which the middle counts five times; the border stays."""
    if min(images.shape[2:]) <= 2:
        return images
    pixels = images.float()
    inner = pixels[:, :, 1:-1, 1:-1]
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    blurred = ((rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner) / 13).round()
    changed = inner + (1 - _column(values)) * (blurred - inner)
    pixels[:, :, 1:-1, 1:-1] = changed.clamp(0, 255)
    return pixels.to(torch.uint8)


def posterize(images: UInt8[Tensor, "b 3 h w"], values: Float[Tensor, "b 6"]) -> UInt8[Tensor, "b 3 h w"]:
    return images & _column(values).to(torch.uint8)


def solarize(images: UInt8[Tensor, "b 3 h w"], values: Float[Tensor, "b 6"]) -> UInt8[Tensor, "b 3 h w"]:
    return torch.where(images >= _column(values), 255 - images, images)


def autocontrast(images: UInt8[Tensor, "b 3 h w"], values: Float[Tensor, "b 6"]) -> UInt8[Tensor, "b 3 h w"]:
    """Spread each channel over all levels, unless it has one only. torchvision's kernel indexes with booleans."""
    darkest, brightest = (limit(images, dim=(2, 3), keepdim=True).float() for limit in (torch.amin, torch.amax))
    spread = (images - darkest) / ((brightest - darkest) / 255).clamp(min=1 / 255)
    return torch.where(brightest > darkest, spread.clamp(0, 255).to(torch.uint8), images)


def equalize(images: UInt8[Tensor, "b 3 h w"], values: Float[Tensor, "b 6"]) -> UInt8[Tensor, "b 3 h w"]:
    define_operators()
    from torchvision.transforms.v2.functional import equalize

    return equalize(images)


# Whether each pixel is blended with its grey, and whether with the image's mean grey; with black if with neither.
BLENDS = {"Brightness": (0.0, 0.0), "Color": (1.0, 0.0), "Contrast": (0.0, 1.0)}

# By the name of the operation, except that one does all moves, and one all of BLENDS. None leaves an image alone.
KERNELS: dict[str, Callable | None] = {
    "Identity": None,
    "Move": move,
    "Blend": blend,
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
}
