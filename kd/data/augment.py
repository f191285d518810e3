"""Augment a whole batch at a time, with random numbers that are pure functions of (seed, number, sample index).

`number` counts an image's views: the epoch, or with --views what ViewConfig.number says. No draw depends on the rest of
the batch, so that a teacher's cached logits of an augmented image can be found again, and no random state has to be
saved.

Crops, flips, policies and colours work on stored images (uint8, decoded and resized), so that every storage gives the
same pixels and a crop has no more detail than --stored-size keeps; mixing and erasing work on normalised images.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kd.config import ViewConfig
from kd.data.policies import GREY, Policy, apply_policy, change_drawn, grey
from kd.utils.rng import derive, random_below, random_uniform

VERSION = 1
"""Of the views that flags, seed, number and row give. Whoever changes a draw raises it, or caches of a teacher's logits
would answer for other views; tests/data/test_view_version.py compares every flag's views with recorded ones."""

CUTOUT_COLOUR = (125, 123, 114)  # a grey, as in FixMatch's code and that of the methods with two views

ATTEMPTS = 10  # to draw a box that fits, as in torchvision's RandomResizedCrop

SIGMAS = (0.1, 2.0)  # pixels; smallest and largest blur (SimCLR: Chen et al., arXiv:2002.05709, appendix A)

GREY_STEPS = 2**16  # per level: greys are rounded to these before summing; float32 has no finer ones at 255

QUANTILES = 4096  # steps of a table of quantiles; draws are interpolated between them


def view_seed(config: ViewConfig, seed: int) -> int:
    """The seed of all views. With --views K they do not depend on --seed."""
    return config.view_seed if config.count else seed


def augment(
    config: ViewConfig,
    images: UInt8[Tensor, "b c m n"],
    index: Int[Tensor, "b"],
    seed: int,
    number: int,
    size: tuple[int, int],
    drawn: "Drawn | None" = None,
) -> UInt8[Tensor, "b c h w"]:
    """View `number` of the stored `images` of the samples `index`, cropped to `size` (height, width).

    In the order of torchvision's recipes: crop, flip, policy, colours, blur. `drawn`: what `draw` gives for these
    samples, if it is there already.
    """
    drawn = drawn or draw(config, tuple(images.shape[2:]), index, seed, number, size)
    if config.resized_crop:
        boxes = draw_boxes(config, tuple(images.shape[2:]), index, seed, number)
        images = resized_crop(images, boxes, size)
    images = crop_and_flip(images, drawn.crop, config.padding, size)
    if config.vertical_flip:
        upside_down = random_below(2, index, seed, "vertical flip", number).bool()
        images = torch.where(upside_down[:, None, None, None], images.flip(2), images)
    images = apply_policy(policy_of(config), images, index, seed, number)
    if config.colour_jitter:
        images = jitter(images, drawn.factors)
    if config.hue:
        images = turn_hue(images, config.hue * (2 * random_uniform(index, seed, "hue", number) - 1))
    if config.grey:
        chosen = random_uniform(index, seed, "grey", number) < config.grey
        images = change_drawn(images, chosen, lambda rows: grey(rows).to(torch.uint8).expand_as(rows))
    if config.blur:
        chosen = random_uniform(index, seed, "blur", number) < config.blur
        images = change_drawn(images, chosen, blur, draw_sigmas(index, seed, number))
    return images


def policy_of(config: ViewConfig) -> Policy:
    """The policy that the flags describe."""
    ops = Policy().ops if config.policy_ops is None else config.policy_ops
    return Policy(config.policy, ops, config.policy_magnitude)


def augment_strongly(
    config: ViewConfig,
    images: UInt8[Tensor, "b c m n"],
    index: Int[Tensor, "b"],
    seed: int,
    number: int,
    size: tuple[int, int],
    drawn: "Drawn | None" = None,
) -> UInt8[Tensor, "b c h w"]:
    """The strong view `number`, of methods with two: augmented as the weak one by draws of its own, then by FixMatch's
    RandAugment and a grey square.

    As in the code of MLKD and CRLD: its RandAugment(2, 10) never reads the 10, but draws every strength anew, and ends
    with a grey square. With --strong-magnitude, torchvision's RandAugment in its place.
    """
    seed = strong_seed(seed)
    images = augment(config, images, index, seed, number, size, drawn)
    name = "fixmatch" if config.strong_magnitude is None else "rand"
    policy = Policy(name, config.strong_ops, config.strong_magnitude)
    images = apply_policy(policy, images, index, derive(seed, "strong policy"), number)
    return cut_out(images, config.strong_cutout, index, seed, number) if config.strong_cutout else images


def strong_seed(seed: int) -> int:
    """The seed of the strong view's draws, so that they differ from the weak view's."""
    return derive(seed, "strong")


def cut_out(
    images: UInt8[Tensor, "b 3 h w"], largest: float, index: Int[Tensor, "b"], seed: int, number: int
) -> UInt8[Tensor, "b 3 h w"]:
    """Paint a grey square into each image (arXiv:1708.04552): its side is 0 to `largest` of the width, its centre is
    anywhere, and the border cuts it off."""
    height, width = images.shape[2:]
    side = largest * random_uniform(index, seed, "cutout", number) * width
    shares = (side / height).clamp(max=1), (side / width).clamp(max=1)
    box = _random_boxes(*shares, (height, width), index, seed, "cutout box", number, clipped=True)
    return torch.where(box[:, None], _cutout_colour(images.device), images)


@cache
def _cutout_colour(device: torch.device) -> UInt8[Tensor, "3 1 1"]:
    return torch.tensor(CUTOUT_COLOUR, dtype=torch.uint8, device=device)[:, None, None]


class CropFlip(NamedTuple):
    """Each image's crop of the padded image, and whether it is flipped."""

    top: Int[Tensor, "b"]  # first row of the crop
    left: Int[Tensor, "b"]
    flip: Bool[Tensor, "b"]


def draw_crop_flip(config: ViewConfig, seed: int, number: int, index: Int[Tensor, "b"], spare: int = 0) -> CropFlip:
    """The crops and flips of the samples `index` in view `number`.

    `spare`: pixels by which stored images are higher, and wider, than what the network sees.
    """
    offsets = 2 * config.padding + spare + 1
    top = random_below(offsets, index, seed, "top", number)
    left = random_below(offsets, index, seed, "left", number)
    if config.alternating_flip:  # as in cifar10-airbench (Jordan, arXiv:2404.00498)
        flip = (random_below(2, index, seed, "alternating flip") ^ (number & 1)).bool()
    else:
        flip = random_below(2, index, seed, "flip", number).bool() if config.flip else torch.zeros_like(index).bool()
    return CropFlip(top, left, flip)


def crop_and_flip(
    images: UInt8[Tensor, "b c m n"], view: CropFlip, padding: int, size: tuple[int, int] | None = None
) -> UInt8[Tensor, "b c h w"]:
    """Pad with black, crop to `size` (the images' own if left out) and flip, in one gather."""
    b, c = images.shape[:2]
    h, w = size or images.shape[2:]
    device = images.device
    padded = F.pad(images, (padding, padding, padding, padding))
    rows = view.top[:, None] + torch.arange(h, device=device)
    across = torch.arange(w, device=device)
    columns = view.left[:, None] + torch.where(view.flip[:, None], across.flip(0), across)
    sample = torch.arange(b, device=device)[:, None, None, None]
    channel = torch.arange(c, device=device)[:, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Drawn(NamedTuple):
    """What is drawn for a view of each sample before its images are seen, of whole numbers or by exact arithmetic: the
    same bits for a sample alone, in a batch, and among all rows."""

    crop: CropFlip
    factors: "Factors | None"  # with --colour-jitter

    def of(self, index: Int[Tensor, "b"]) -> "Drawn":
        """Those of some rows, of what was drawn for all."""
        factors = self.factors and Factors(*(part[index] for part in self.factors))
        return Drawn(CropFlip(*(part[index] for part in self.crop)), factors)


def draw(
    config: ViewConfig,
    stored: tuple[int, int],
    index: Int[Tensor, "b"],
    seed: int,
    number: int,
    size: tuple[int, int],
) -> Drawn:
    """What `augment` needs for view `number` of the samples `index`, stored in `stored` pixels (height, width).

    Drawn for all rows of a split at once, a batch costs a GPU a few look-ups in place of a hundred small kernels.
    """
    factors = draw_factors(config.colour_jitter, index, seed, number) if config.colour_jitter else None
    spare = 0 if config.resized_crop else stored[0] - size[0]
    return Drawn(draw_crop_flip(config, seed, number, index, spare), factors)


class Boxes(NamedTuple):
    """A rectangle of each image, in whole pixels."""

    top: Int[Tensor, "b"]
    left: Int[Tensor, "b"]
    height: Int[Tensor, "b"]
    width: Int[Tensor, "b"]


def draw_boxes(config: ViewConfig, size: tuple[int, int], index: Int[Tensor, "b"], seed: int, number: int) -> Boxes:
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


def resized_crop(images: UInt8[Tensor, "b c m n"], boxes: Boxes, size: tuple[int, int]) -> UInt8[Tensor, "b c h w"]:
    """Crop each image to its box and resize that to `size` (height, width), bilinearly.

    Differs from torchvision: no antialiasing of a box larger than `size`, which only --stored-size makes possible.
    """
    axes = []
    for start, length, stored, seen in zip(boxes[:2], boxes[2:], images.shape[2:], size):
        steps = (torch.arange(seen, device=images.device) + 0.5) / seen
        # Clamped to the box: pixels beside it must not be interpolated in.
        within = (steps * length[:, None] - 0.5).clamp(min=0).minimum((length[:, None] - 1).float())
        axes.append((start[:, None] + within) * (2 / max(stored - 1, 1)) - 1)
    rows, columns = axes
    grid = torch.stack([columns[:, None, :].expand(-1, size[0], -1), rows[:, :, None].expand(-1, -1, size[1])], dim=3)
    resized = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return resized.round().to(torch.uint8)


class Factors(NamedTuple):
    """Factors of each image's brightness, contrast and saturation; 1 changes nothing."""

    brightness: Float[Tensor, "b"]
    contrast: Float[Tensor, "b"]
    saturation: Float[Tensor, "b"]


def draw_factors(strength: float, index: Int[Tensor, "b"], seed: int, number: int) -> Factors:
    """Independent factors, uniform between 1 - strength and 1 + strength."""
    return Factors(*(1 + strength * (2 * random_uniform(index, seed, name, number) - 1) for name in Factors._fields))


def jitter(images: UInt8[Tensor, "b 3 h w"], factors: Factors) -> UInt8[Tensor, "b 3 h w"]:
    """Change brightness, then contrast about the mean grey, then saturation about each pixel's own grey.

    Differs from torchvision: always in this order.
    """
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in factors)
    changed = (images.float() * brightness).clamp(0, 255)
    # Summed as integers: the rounding of a float sum depends on how threads split it, and so on the batch.
    steps = (_grey(changed) * GREY_STEPS).round().long()
    mean = steps.sum(dim=(1, 2, 3), keepdim=True).double() / (GREY_STEPS * steps[0].numel())
    changed = _scale_about(changed, mean.float(), contrast)
    changed = _scale_about(changed, _grey(changed), saturation)
    return changed.round().to(torch.uint8)


def _grey(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    red, green, blue = images.split(1, dim=1)
    return GREY[0] / 10_000 * red + GREY[1] / 10_000 * green + GREY[2] / 10_000 * blue


def _scale_about(images: Tensor, centre: Tensor, factor: Tensor) -> Tensor:
    return (centre + (images - centre) * factor).clamp(0, 255)


def turn_hue(images: UInt8[Tensor, "b 3 h w"], share: Float[Tensor, "b"]) -> UInt8[Tensor, "b 3 h w"]:
    """Turn each image's hues by a `share` of the colour circle; brightest and darkest channel keep their levels."""
    pixels = images.float()
    red, green, blue = pixels.unbind(1)
    brightest, darkest = pixels.amax(1), pixels.amin(1)
    spread = brightest - darkest
    safe = spread.clamp(min=1)  # a grey pixel has no hue
    by_green = torch.where(brightest == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    sextant = torch.where(brightest == red, (green - blue) / safe, by_green) + 6 * share[:, None, None]
    turned = []
    for offset in (5, 3, 1):  # red, green, blue
        place = (sextant + offset) % 6
        turned.append(brightest - spread * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.stack(turned, dim=1).round().to(torch.uint8)


def draw_sigmas(index: Int[Tensor, "b"], seed: int, number: int) -> Float[Tensor, "b"]:
    """The deviations of each image's blur, in pixels."""
    low, high = SIGMAS
    return low + (high - low) * random_uniform(index, seed, "sigma", number)


def blur(images: UInt8[Tensor, "b 3 h w"], sigmas: Float[Tensor, "b"]) -> UInt8[Tensor, "b 3 h w"]:
    """Blur by a Gaussian over a tenth of each side, 3 pixels at least (SimCLR, as above), with mirrored borders."""
    pixels = images.float()
    for axis in (3, 2):
        reach = max(1, images.shape[axis] // 20)
        distance = torch.arange(reach + 1, device=images.device)
        # In double, whose last bit is lost when rounded: that of exp depends on the place in the batch.
        heights = (-0.5 * (distance / sigmas[:, None].double()) ** 2).exp()
        weights = (heights / (heights[:, :1] + 2 * heights[:, 1:].sum(1, keepdim=True))).float()[:, :, None, None, None]
        length = images.shape[axis]
        padded = F.pad(pixels, (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach), mode="reflect")
        pixels = weights[:, 0] * pixels
        for step in range(1, reach + 1):
            sides = padded.narrow(axis, reach - step, length) + padded.narrow(axis, reach + step, length)
            pixels = pixels + weights[:, step] * sides
    return pixels.round().to(torch.uint8)


class Mixing(NamedTuple):
    """How mixup or cutmix combines each image with its partner."""

    partner: Int[Tensor, "b"]  # row of the training split
    weight: Float[Tensor, "b"]  # the image's own share; with cutmix, of the area
    box: Bool[Tensor, "b h w"]  # true for pixels that cutmix takes from the partner
    paste: Bool[Tensor, "b"]  # true for cutmix, false for mixup


def draw_partners(rows: int, index: Int[Tensor, "b"], seed: int, number: int) -> Int[Tensor, "b"]:
    """The row, of `rows`, with which each of the samples `index` is mixed in view `number`."""
    return random_below(rows, index, seed, "partner", number)


def draw_mixing(
    config: ViewConfig, seed: int, number: int, index: Int[Tensor, "b"], rows: int, size: tuple[int, int]
) -> Mixing:
    """The mixing of the samples `index` of `rows`, for images of `size` (height, width), in view `number`."""
    partner = draw_partners(rows, index, seed, number)
    paste = torch.full_like(index, config.cutmix > 0).bool()
    if config.mixup and config.cutmix:
        paste = random_below(2, index, seed, "paste", number).bool()
    mixup_weight = random_beta(config.mixup or 1.0, index, seed, "mixup", number)
    cutmix_weight = random_beta(config.cutmix or 1.0, index, seed, "cutmix", number)
    side = (1 - cutmix_weight).sqrt()
    box = _random_boxes(side, side, size, index, seed, "cutmix box", number, clipped=True) & paste[:, None, None]
    # The border may cut the box off: the weight follows from the pixels that are left (arXiv:1905.04899, code).
    weight = torch.where(paste, 1 - box.float().mean(dim=(1, 2)), mixup_weight)
    return Mixing(partner, weight, box, paste)


def mix(
    images: Float[Tensor, "b c h w"], partners: Float[Tensor, "b c h w"], mixing: Mixing
) -> Float[Tensor, "b c h w"]:
    """Blend each normalised image with its partner (mixup), or paste a box of the partner into it (cutmix)."""
    pasted = torch.where(mixing.box[:, None], partners, images)
    blended = torch.lerp(partners, images, mixing.weight[:, None, None, None])
    return torch.where(mixing.paste[:, None, None, None], pasted, blended)


def erase(
    images: Float[Tensor, "b c h w"], share: float, seed: int, number: int, index: Int[Tensor, "b"]
) -> Float[Tensor, "b c h w"]:
    """Set a box of a `share` of the images to the mean (0): 2 to 33% of the area, 0.3 to 3.3 times as high as wide."""
    size = tuple(images.shape[2:])
    area = 0.02 + 0.31 * random_uniform(index, seed, "erase area", number)
    ratio = (random_uniform(index, seed, "erase ratio", number) * 2 - 1).mul(np.log(3.3)).exp()
    height, width = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    chosen = random_uniform(index, seed, "erase", number) < share
    box = _random_boxes(height, width, size, index, seed, "erase box", number, clipped=False) & chosen[:, None, None]
    return images.masked_fill(box[:, None], 0)


def _random_boxes(
    height: Float[Tensor, "b"],
    width: Float[Tensor, "b"],
    size: tuple[int, int],
    index: Int[Tensor, "b"],
    *words: int | str,
    clipped: bool,
) -> Bool[Tensor, "b h w"]:
    """Masks of boxes of these shares of height and width: centred on a random pixel and clipped, or all inside."""
    inside = []
    for name, share, length in (("rows", height, size[0]), ("columns", width, size[1])):
        extent = (share * length).round().long()
        drawn = random_uniform(index, *words, name)
        start = (drawn * length).long() - extent // 2 if clipped else (drawn * (length - extent + 1)).long()
        position = torch.arange(length, device=index.device)
        inside.append((position >= start[:, None]) & (position < (start + extent)[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]


def random_beta(alpha: float, index: Int[Tensor, "b"], *words: int | str) -> Float[Tensor, "b"]:
    """A draw from Beta(alpha, alpha) for each index."""
    table = _quantile_table(alpha, index.device)
    place = random_uniform(index, *words) * QUANTILES
    low = place.long()
    return torch.lerp(table[low], table[low + 1], place - low)


@cache
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
