"""What is drawn at random for the views of many samples at once: pure functions of (seed, number, sample index).

`number` counts an image's views: the epoch, or with --views what ViewConfig.number says. No draw depends on the rest of
the batch, so that a teacher's cached logits of an augmented image can be found again, and no random state has to be
saved. All draws of a block of an epoch's samples take about as many kernels as those of one batch; a batch is then a
slice of them, which costs a GPU nothing. kd/data/augment.py applies them to pixels.

Every operation is by element, and gives a sample the same bits wherever it stands: tests/data/test_draws.py compares a
sample alone, in a batch and among all rows.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd.config import ViewConfig
from kd.data.policies import Policy, PolicyDraws, draw_policy
from kd.utils.constants import made_once
from kd.utils.floats import widest
from kd.utils.rng import derive, random_below, random_uniform

BLOCK = 2**14  # images that are drawn for at once: 0.3 MB of draws for crops and flips, 18 MB with every flag

ATTEMPTS = 10  # to draw a box that fits, as in torchvision's RandomResizedCrop

SIGMAS = (0.1, 2.0)  # pixels; smallest and largest blur (SimCLR: Chen et al., arXiv:2002.05709, appendix A)

QUANTILES = 4096  # steps of a table of quantiles; draws are interpolated between them


class CropFlip(NamedTuple):
    """Each image's crop of the padded image, and whether it is flipped; None: no image is."""

    top: Int[Tensor, "n"]  # first row of the crop
    left: Int[Tensor, "n"]
    flip: Bool[Tensor, "n"] | None
    upside_down: Bool[Tensor, "n"] | None = None


class Boxes(NamedTuple):
    """A rectangle of each image, in whole pixels."""

    top: Int[Tensor, "n"]
    left: Int[Tensor, "n"]
    height: Int[Tensor, "n"]
    width: Int[Tensor, "n"]


class Edges(NamedTuple):
    """A rectangle of each image that its border may cut off: pixels from `top` to before `bottom`; maybe none."""

    top: Int[Tensor, "n"]
    bottom: Int[Tensor, "n"]
    left: Int[Tensor, "n"]
    right: Int[Tensor, "n"]

    def share(self, size: tuple[int, int]) -> Float[Tensor, "n"]:
        """The share that it covers of images of `size` (height, width)."""
        height, width = (
            end.clamp(max=length) - start.clamp(min=0)
            for start, end, length in zip(self[::2], self[1::2], size, strict=True)
        )
        return (height * width).float() / (size[0] * size[1])


class Factors(NamedTuple):
    """Factors of each image's brightness, contrast and saturation; 1 changes nothing."""

    brightness: Float[Tensor, "n"]
    contrast: Float[Tensor, "n"]
    saturation: Float[Tensor, "n"]


class Blur(NamedTuple):
    """Which images are blurred, and the weights of a Gaussian: of the middle pixel, and of those on either side."""

    chosen: Bool[Tensor, "n"]
    across: Float[Tensor, "n r"]
    down: Float[Tensor, "n q"]


class Strong(NamedTuple):
    """What is drawn for the strong view alone."""

    policy: PolicyDraws
    cut_out: Edges | None


class Drawn(NamedTuple):
    """What is drawn for one view of each image; None where the flags ask for nothing."""

    crop: CropFlip | None
    boxes: Boxes | None  # with --resized-crop
    policy: PolicyDraws | None
    factors: Factors | None  # with --colour-jitter
    hue: Float[Tensor, "n"] | None  # by which share of the colour circle
    grey: Bool[Tensor, "n"] | None
    blur: Blur | None
    strong: Strong | None


class Mixing(NamedTuple):
    """How mixup or cutmix combines each image with its partner."""

    weight: Float[Tensor, "n"]  # the image's own share; with cutmix, of the area
    box: Edges | None  # with --cutmix: what is taken from the partner
    paste: Bool[Tensor, "n"] | None  # with --mixup and --cutmix: true for cutmix, false for mixup


def view_seed(config: ViewConfig, seed: int) -> int:
    """The seed of all views. With --views K they do not depend on --seed."""
    return config.view_seed if config.count else seed


def strong_seed(seed: int) -> int:
    """The seed of the strong view's draws, so that they differ from the weak view's."""
    return derive(seed, "strong")


def policy_of(config: ViewConfig) -> Policy:
    """The policy that the flags describe."""
    ops = Policy().ops if config.policy_ops is None else config.policy_ops
    return Policy(config.policy, ops, config.policy_magnitude)


def strong_policy_of(config: ViewConfig) -> Policy:
    """The policy of the strong view: FixMatch's, or with --strong-magnitude torchvision's RandAugment."""
    name = "fixmatch" if config.strong_magnitude is None else "rand"
    return Policy(name, config.strong_ops, config.strong_magnitude)


class Sizes(NamedTuple):
    """Height and width of images."""

    stored: tuple[int, int]
    seen: tuple[int, int]  # by the network


def draw(config: ViewConfig, sizes: Sizes, index: Int[Tensor, "n"], seed: int, number: int) -> Drawn:
    """What `augment` needs for view `number` of the samples `index`."""
    policy, size = policy_of(config), sizes.seen
    spare = 0 if config.resized_crop else sizes.stored[0] - size[0]
    moves = config.padding or spare or config.flip or config.vertical_flip
    return Drawn(
        draw_crop_flip(config, seed, number, index, spare) if moves else None,
        draw_boxes(config, sizes.stored, index, seed, number) if config.resized_crop else None,
        draw_policy(policy, size, index, seed, number) if policy.name != "none" else None,
        draw_factors(config.colour_jitter, index, seed, number) if config.colour_jitter else None,
        config.hue * (2 * random_uniform(index, seed, "hue", number) - 1) if config.hue else None,
        random_uniform(index, seed, "grey", number) < config.grey if config.grey else None,
        draw_blur(config.blur, size, index, seed, number) if config.blur else None,
        strong=None,
    )


def draw_strongly(config: ViewConfig, sizes: Sizes, index: Int[Tensor, "n"], seed: int, number: int) -> Drawn:
    """What `augment_strongly` needs for the strong view `number` of the samples `index`."""
    seed, size = strong_seed(seed), sizes.seen
    policy = draw_policy(strong_policy_of(config), size, index, derive(seed, "strong policy"), number)
    square = draw_cut_out(config.strong_cutout, size, index, seed, number) if config.strong_cutout else None
    return draw(config, sizes, index, seed, number)._replace(strong=Strong(policy, square))


def draw_crop_flip(config: ViewConfig, seed: int, number: int, index: Int[Tensor, "n"], spare: int = 0) -> CropFlip:
    """The crops and flips of the samples `index` in view `number`.

    `spare`: pixels by which stored images are higher, and wider, than what the network sees.
    """
    offsets = 2 * config.padding + spare + 1
    top = random_below(offsets, index, seed, "top", number)
    left = random_below(offsets, index, seed, "left", number)
    flip = upside_down = None
    if config.alternating_flip:  # as in cifar10-airbench (Jordan, arXiv:2404.00498)
        flip = (random_below(2, index, seed, "alternating flip") ^ (number & 1)).bool()
    elif config.flip:
        flip = random_below(2, index, seed, "flip", number).bool()
    if config.vertical_flip:
        upside_down = random_below(2, index, seed, "vertical flip", number).bool()
    return CropFlip(top, left, flip, upside_down)


def draw_boxes(config: ViewConfig, size: tuple[int, int], index: Int[Tensor, "n"], seed: int, number: int) -> Boxes:
    """The boxes of --resized-crop in images of `size` (height, width), for view `number`.

    Takes the first of ten draws that fits, else the largest central box within the aspect ratios, as torchvision does.
    """
    image_height, image_width = size
    draws = index[:, None] * ATTEMPTS + torch.arange(ATTEMPTS, device=index.device)
    smallest, largest = config.resized_crop, config.resized_crop_max
    area = smallest + (largest - smallest) * random_uniform(draws, seed, "box area", number)
    low, high = (math.log(limit) for limit in config.crop_ratio)
    ratio = (low + (high - low) * random_uniform(draws, seed, "box ratio", number)).exp()
    pixels = image_height * image_width * area
    widths, heights = (pixels * ratio).sqrt().round(), (pixels / ratio).sqrt().round()
    fits = (widths <= image_width) & (heights <= image_height) & (widths > 0) & (heights > 0)
    first = fits.int().argmax(dim=1, keepdim=True)
    any_fits = fits.any(dim=1)
    fallback_height = min(image_height, round(image_width / config.crop_ratio[0]))
    fallback_width = min(image_width, round(image_height * config.crop_ratio[1]))
    height = torch.where(any_fits, heights.gather(1, first)[:, 0], fallback_height).long()
    width = torch.where(any_fits, widths.gather(1, first)[:, 0], fallback_width).long()
    corner = []
    for name, room in (("box top", image_height - height), ("box left", image_width - width)):
        drawn = (random_uniform(index, seed, name, number) * (room + 1)).long()
        corner.append(torch.where(any_fits, drawn, room // 2))
    return Boxes(*corner, height, width)


def draw_factors(strength: float, index: Int[Tensor, "n"], seed: int, number: int) -> Factors:
    """Independent factors, uniform between 1 - strength and 1 + strength."""
    return Factors(*(1 + strength * (2 * random_uniform(index, seed, name, number) - 1) for name in Factors._fields))


def draw_blur(share: float, size: tuple[int, int], index: Int[Tensor, "n"], seed: int, number: int) -> Blur:
    """The blur of a `share` of the images of `size` (height, width)."""
    low, high = SIGMAS
    sigmas = low + (high - low) * random_uniform(index, seed, "sigma", number)
    chosen = random_uniform(index, seed, "blur", number) < share
    return Blur(chosen, *(blur_weights(sigmas, length) for length in size[::-1]))


def blur_weights(sigmas: Float[Tensor, "n"], length: int) -> Float[Tensor, "n r"]:
    """The weights of Gaussians of these deviations, in pixels, over a tenth of an image's `length`, 3 pixels at least.

    Of the middle pixel, and of those 1, 2, ... pixels beside it on either side.
    """
    distance = torch.arange(max(1, length // 20) + 1, device=sigmas.device)
    # In float64, whose last bit is lost when rounded: that of exp depends on the place in the batch.
    heights = (-0.5 * (distance / sigmas[:, None].to(widest(sigmas.device))) ** 2).exp()
    return (heights / (heights[:, :1] + 2 * heights[:, 1:].sum(1, keepdim=True))).float()


def draw_cut_out(largest: float, size: tuple[int, int], index: Int[Tensor, "n"], seed: int, number: int) -> Edges:
    """A square in images of `size` (arXiv:1708.04552): its side is 0 to `largest` of the width, its centre is anywhere,
    and the border cuts it off."""
    height, width = size
    side = largest * random_uniform(index, seed, "cutout", number) * width
    shares = (side / height).clamp(max=1), (side / width).clamp(max=1)
    return _rectangles(*shares, size, index, seed, "cutout box", number, clipped=True)


def draw_partners(rows: int, index: Int[Tensor, "n"], seed: int, number: int) -> Int[Tensor, "n"]:
    """The row, of `rows`, with which each of the samples `index` is mixed in view `number`."""
    return random_below(rows, index, seed, "partner", number)


def draw_mixing(config: ViewConfig, size: tuple[int, int], index: Int[Tensor, "n"], seed: int, number: int) -> Mixing:
    """The mixing of the samples `index`, for images of `size` (height, width), in view `number`."""
    if not config.cutmix:
        return Mixing(random_beta(config.mixup, index, seed, "mixup", number), None, None)
    side = (1 - random_beta(config.cutmix, index, seed, "cutmix", number)).sqrt()
    box = _rectangles(side, side, size, index, seed, "cutmix box", number, clipped=True)
    # The border may cut the box off: the weight follows from the pixels that are left (arXiv:1905.04899, code).
    weight = 1 - box.share(size)
    if not config.mixup:
        return Mixing(weight, box, None)
    paste = random_below(2, index, seed, "paste", number).bool()
    return Mixing(torch.where(paste, weight, random_beta(config.mixup, index, seed, "mixup", number)), box, paste)


def draw_erased(share: float, size: tuple[int, int], index: Int[Tensor, "n"], seed: int, number: int) -> Edges:
    """A box of a `share` of the images of `size`, 2 to 33% of the area, 0.3 to 3.3 times as high as wide; of no pixels
    in the others."""
    area = 0.02 + 0.31 * random_uniform(index, seed, "erase area", number)
    ratio = (random_uniform(index, seed, "erase ratio", number) * 2 - 1).mul(np.log(3.3)).exp()
    height, width = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    chosen = random_uniform(index, seed, "erase", number) < share
    box = _rectangles(height, width, size, index, seed, "erase box", number, clipped=False)
    return box._replace(bottom=torch.where(chosen, box.bottom, box.top))


def _rectangles(
    height: Float[Tensor, "n"],
    width: Float[Tensor, "n"],
    size: tuple[int, int],
    index: Int[Tensor, "n"],
    *words: int | str,
    clipped: bool,
) -> Edges:
    """Rectangles of these shares of height and width: centred on a random pixel and clipped, or all inside."""
    edges = []
    for name, share, length in (("rows", height, size[0]), ("columns", width, size[1])):
        extent = (share * length).round().long()
        drawn = random_uniform(index, *words, name)
        start = (drawn * length).long() - extent // 2 if clipped else (drawn * (length - extent + 1)).long()
        edges += [start, start + extent]
    return Edges(*edges)


def random_beta(alpha: float, index: Int[Tensor, "n"], *words: int | str) -> Float[Tensor, "n"]:
    """A draw from Beta(alpha, alpha) for each index."""
    table = _quantile_table(alpha, index.device)
    place = random_uniform(index, *words) * QUANTILES
    low = place.long()
    return torch.lerp(table[low], table[low + 1], place - low)


@made_once
def _quantile_table(alpha: float, device: torch.device) -> Float[Tensor, "n"]:
    """The quantiles on the device, copied once: a copy in every step would make the host wait."""
    return torch.tensor(beta_quantiles(alpha), dtype=torch.float32, device=device)


@cache
def beta_quantiles(alpha: float) -> tuple[float, ...]:
    """Quantiles of Beta(alpha, alpha) at QUANTILES + 1 equal steps from 0 to 1.

    Integrated over t = log(x / (1 - x)), where the density is smooth for every alpha.
    """
    t = np.linspace(-40 / alpha, 40 / alpha, 400_001)
    density = np.exp(-alpha * (np.logaddexp(0, t) + np.logaddexp(0, -t)))
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    at = np.interp(np.linspace(0, 1, QUANTILES + 1), mass / mass[-1], t)
    return tuple(1 / (1 + np.exp(-at)))


class BatchDraws(NamedTuple):
    """All that is drawn for one batch."""

    views: tuple[Drawn, ...]  # weak, and with two views strong; of the samples, and then of their partners
    mixing: Mixing | None
    erased: tuple[Edges, ...] | None  # of each view


class Draws(NamedTuple):
    """What is drawn for the views of a split's samples, and how."""

    config: ViewConfig
    sizes: Sizes
    seed: int
    two_views: bool

    def of_batches(self, batches: Sequence[Int[Tensor, "..."]], number: int, mixes: bool) -> Iterator[BatchDraws]:
        """Those of each batch's samples in view `number`. `mixes`: a batch's second half are its partners."""
        for block in _blocks(batches):
            sizes = [len(batch) for batch in block]
            own = [size // (1 + mixes) for size in sizes]
            samples = torch.cat([batch[:size] for batch, size in zip(block, own)])
            drawn = self._draw(torch.cat(block) if mixes else samples, samples, number, mixes)
            parts = (_split(part, by) for part, by in zip(drawn, (sizes, own, own), strict=True))
            for _, *batch in zip(block, *parts):
                yield BatchDraws(*batch)

    def _draw(self, read: Int[Tensor, "m"], samples: Int[Tensor, "n"], number: int, mixes: bool) -> BatchDraws:
        config, size = self.config, self.sizes.seen
        kinds = (draw, draw_strongly)[: 1 + self.two_views]
        views = tuple(kind(config, self.sizes, read, self.seed, number) for kind in kinds)
        mixing = draw_mixing(config, size, samples, self.seed, number) if mixes else None
        erased = None
        if config.erase:
            seeds = (self.seed, strong_seed(self.seed))[: len(kinds)]
            erased = tuple(draw_erased(config.erase, size, samples, seed, number) for seed in seeds)
        return BatchDraws(views, mixing, erased)


def _blocks(batches: Sequence[Int[Tensor, "..."]]) -> Iterator[list[Int[Tensor, "..."]]]:
    """Consecutive batches, together of BLOCK samples or a few more."""
    block, count = [], 0
    for batch in batches:
        block.append(batch)
        count += len(batch)
        if count >= BLOCK:
            yield block
            block, count = [], 0
    if block:
        yield block


def _split(drawn: Tensor | tuple | None, sizes: list[int]) -> Iterator:
    """Parts of `sizes` rows of a tensor, or of each tensor in tuples in tuples; without end if there is none."""
    if isinstance(drawn, Tensor):
        return iter(drawn.split(sizes))
    if not drawn:  # None, or a policy of no operations
        return repeat(drawn)
    make = getattr(drawn, "_make", tuple)  # a NamedTuple's, or a plain tuple's
    return map(make, zip(*(_split(part, sizes) for part in drawn)))
