"""Random resized crops and colour jitter as views: functions of (seed, number, sample index), a whole batch at a time.

They work on the images as they are held, decoded and brought to one size, so that they see the same pixels however the
data is held; a crop therefore holds no detail that --stored-size has not kept.
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
from kd.utils.rng import random_below, random_share

ATTEMPTS = 10  # at a box that fits, as in torchvision's RandomResizedCrop


SHAPE = (3 / 4, 4 / 3)  # width over height, from and to (Szegedy et al., arXiv:1409.4842, section 6)


GREY = (0.2989, 0.587, 0.114)  # of red, green and blue (ITU-R 601, as torchvision rounds it)


PARTS = 2**16  # of a level, to which greys are rounded before they are summed: float32 holds no finer ones at 255


class Boxes(NamedTuple):
    """A part of each image, in whole pixels."""

    top: Int[Tensor, "b"]
    left: Int[Tensor, "b"]
    height: Int[Tensor, "b"]
    width: Int[Tensor, "b"]


class Factors(NamedTuple):
    """By how much each image's brightness, contrast and saturation are multiplied; 1 changes nothing."""

    brightness: Float[Tensor, "b"]
    contrast: Float[Tensor, "b"]
    saturation: Float[Tensor, "b"]


def draw_boxes(smallest: float, size: tuple[int, int], index: Int[Tensor, "b"], seed: int, number: int) -> Boxes:
    """Boxes of `smallest` to all of the area of images of `size` (height, width), each in the view `number`.

    The first of ten attempts that fits, else the largest in the middle that is not too narrow, as torchvision does.
    """
    high, wide = size
    tries = index[:, None] * ATTEMPTS + torch.arange(ATTEMPTS, device=index.device)
    area = smallest + (1 - smallest) * random_share(tries, seed, "box area", number)
    low, top = (math.log(limit) for limit in SHAPE)
    ratio = (low + (top - low) * random_share(tries, seed, "box ratio", number)).exp()
    widths, heights = (high * wide * area * ratio).sqrt().round(), (high * wide * area / ratio).sqrt().round()
    fits = (widths <= wide) & (heights <= high) & (widths > 0) & (heights > 0)
    first = fits.int().argmax(dim=1, keepdim=True)
    any_fits = fits.any(dim=1)
    whole = (min(high, round(wide / SHAPE[0])), min(wide, round(high * SHAPE[1])))
    height = torch.where(any_fits, heights.gather(1, first)[:, 0], whole[0]).long()
    width = torch.where(any_fits, widths.gather(1, first)[:, 0], whole[1]).long()
    places = []
    for name, room in (("box top", high - height), ("box left", wide - width)):
        drawn = (random_share(index, seed, name, number) * (room + 1)).long()
        places.append(torch.where(any_fits, drawn, room // 2))
    return Boxes(*places, height, width)


def resized_crop(images: UInt8[Tensor, "b c m n"], box: Boxes, size: tuple[int, int]) -> UInt8[Tensor, "b c h w"]:
    """Each image's box brought to `size` (height, width), bilinearly.

    Differs from torchvision: nothing is smoothed where a box is larger than `size`, which it is only with images held
    larger than they are seen (--stored-size).
    """
    axes = []
    for start, length, have, want in zip(box[:2], box[2:], images.shape[2:], size):
        step = (torch.arange(want, device=images.device) + 0.5) / want
        # Never outside of the box: what lies beside it must not shine in.
        within = (step * length[:, None] - 0.5).clamp(min=0).minimum((length[:, None] - 1).float())
        axes.append((start[:, None] + within) * (2 / max(have - 1, 1)) - 1)
    rows, columns = axes
    grid = torch.stack([columns[:, None, :].expand(-1, size[0], -1), rows[:, :, None].expand(-1, -1, size[1])], dim=3)
    seen = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return seen.round().to(torch.uint8)


def draw_factors(strength: float, index: Int[Tensor, "b"], seed: int, number: int) -> Factors:
    """From 1 - strength to 1 + strength, evenly, each for itself."""
    return Factors(*(1 + strength * (2 * random_share(index, seed, name, number) - 1) for name in Factors._fields))


def jitter(images: UInt8[Tensor, "b 3 h w"], by: Factors) -> UInt8[Tensor, "b 3 h w"]:
    """Brightness, then contrast about the mean grey, then saturation about each pixel's own grey.

    Differs from torchvision: always in this order, and without hue.
    """
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in by)
    seen = (images.float() * brightness).clamp(0, 255)
    # Summed as whole numbers: a sum of fractions depends on how threads share it out, and so on the batch.
    parts = (_grey(seen) * PARTS).round().long()
    mean = parts.sum(dim=(1, 2, 3), keepdim=True).double() / (PARTS * parts[0].numel())
    seen = _blend(seen, mean.float(), contrast)
    seen = _blend(seen, _grey(seen), saturation)
    return seen.round().to(torch.uint8)


def _grey(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    red, green, blue = images.split(1, dim=1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def _blend(images: Tensor, towards: Tensor, factor: Tensor) -> Tensor:
    return (towards + (images - towards) * factor).clamp(0, 255)


#: (kd.mixing) Mixup, cutmix and random erasing as views: partner, share and box are functions of (seed, number, sample index),
#: never of the batch, so that a teacher's answer to a mixed image can be kept and found again.


TABLE = 4096  # entries of a quantile table; between them it is interpolated


class Blend(NamedTuple):
    """How each image of a batch is mixed with its partner."""

    partner: Int[Tensor, "b"]  # row of the training split
    weight: Float[Tensor, "b"]  # the image's own share; by area where a box is pasted
    box: Bool[Tensor, "b h w"]  # true where the partner's pixels are pasted
    paste: Bool[Tensor, "b"]  # whether the image is pasted into (cutmix) or blended (mixup)


@cache
def beta_quantiles(alpha: float) -> tuple[float, ...]:
    """Quantiles of Beta(alpha, alpha) at TABLE + 1 equal steps from 0 to 1.

    Integrated over t = log(x / (1 - x)), where the density is smooth for every alpha.
    """
    t = np.linspace(-40 / alpha, 40 / alpha, 400_001)
    density = np.exp(-alpha * (np.logaddexp(0, t) + np.logaddexp(0, -t)))
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    at = np.interp(np.linspace(0, 1, TABLE + 1), mass / mass[-1], t)
    return tuple(1 / (1 + np.exp(-at)))


@cache
def _table(alpha: float, device: torch.device) -> Float[Tensor, "n"]:
    """The quantiles on the device, copied there once: a copy in the step would make the host wait."""
    return torch.tensor(beta_quantiles(alpha), dtype=torch.float32, device=device)


def beta_share(alpha: float, index: Int[Tensor, "b"], *words: int | str) -> Float[Tensor, "b"]:
    """A draw from Beta(alpha, alpha) for each index."""
    table = _table(alpha, index.device)
    place = random_share(index, *words) * TABLE
    low = place.long()
    return torch.lerp(table[low], table[low + 1], place - low)


def partners(rows: int, index: Int[Tensor, "b"], seed: int, number: int) -> Int[Tensor, "b"]:
    """The row, of `rows`, that each of the samples `index` is mixed with in view `number`."""
    return random_below(rows, index, seed, "partner", number)


def blend(
    config: ViewConfig, seed: int, number: int, index: Int[Tensor, "b"], rows: int, size: tuple[int, int]
) -> Blend:
    """The mixing of the samples `index` of `rows`, for images of `size` (height, width), in view `number`."""
    partner = partners(rows, index, seed, number)
    paste = torch.full_like(index, config.cutmix > 0).bool()
    if config.mixup and config.cutmix:
        paste = random_below(2, index, seed, "paste", number).bool()
    mixed = beta_share(config.mixup or 1.0, index, seed, "mixup", number)
    kept = beta_share(config.cutmix or 1.0, index, seed, "cutmix", number)
    side = (1 - kept).sqrt()
    box = _cutmix_box(side, side, size, index, seed, "cutmix box", number, clipped=True) & paste[:, None, None]
    # The box may be cut off at the border: the share is what is left of it (arXiv:1905.04899, code).
    weight = torch.where(paste, 1 - box.float().mean(dim=(1, 2)), mixed)
    return Blend(partner, weight, box, paste)


def mix(image: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"], how: Blend) -> Float[Tensor, "b c h w"]:
    """Each normalised image with its partner pasted in or blended with it."""
    pasted = torch.where(how.box[:, None], other, image)
    blended = torch.lerp(other, image, how.weight[:, None, None, None])
    return torch.where(how.paste[:, None, None, None], pasted, blended)


def erase(
    image: Float[Tensor, "b c h w"], share: float, seed: int, number: int, index: Int[Tensor, "b"]
) -> Float[Tensor, "b c h w"]:
    """A box of 2 to 33 percent of the area, 0.3 to 3.3 as high as wide, set to the mean (0), in a share of images."""
    size = tuple(image.shape[2:])
    area = 0.02 + 0.31 * random_share(index, seed, "erase area", number)
    ratio = (random_share(index, seed, "erase ratio", number) * 2 - 1).mul(np.log(3.3)).exp()
    high, wide = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    chosen = random_share(index, seed, "erase", number) < share
    box = _cutmix_box(high, wide, size, index, seed, "erase box", number, clipped=False) & chosen[:, None, None]
    return image.masked_fill(box[:, None], 0)


def _cutmix_box(
    high: Float[Tensor, "b"],
    wide: Float[Tensor, "b"],
    size: tuple[int, int],
    index: Int[Tensor, "b"],
    *words: int | str,
    clipped: bool,
) -> Bool[Tensor, "b h w"]:
    """Boxes of the given shares of height and width: about a random pixel and cut off at the border, or all inside."""
    inside = []
    for name, share, length in (("rows", high, size[0]), ("columns", wide, size[1])):
        extent = (share * length).round().long()
        draw = random_share(index, *words, name)
        start = (draw * length).long() - extent // 2 if clipped else (draw * (length - extent + 1)).long()
        at = torch.arange(length, device=index.device)
        inside.append((at >= start[:, None]) & (at < (start + extent)[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]


#: (kd.views) Random choices as pure functions of (seed, number, sample index): the same on every device, for any number of
#: processes, and after any resume. There is no random state anywhere in training that has to be saved.


def view_seed(config: ViewConfig, seed: int, epoch: int) -> tuple[int, int]:
    """What an epoch's views follow from: (seed, number). With --views K they repeat and do not depend on --seed."""
    return (config.view_seed, epoch % config.count) if config.count else (seed, epoch)


class View(NamedTuple):
    """What is done to each image of a batch."""

    top: Int[Tensor, "b"]  # first row of the crop within the padded image
    left: Int[Tensor, "b"]
    flip: Bool[Tensor, "b"]


def draw_view(config: ViewConfig, seed: int, number: int, index: Int[Tensor, "b"], spare: int = 0) -> View:
    """The view `number` (the epoch, where every epoch has its own) of the samples `index`.

    `spare`: pixels by which the images are held larger than they are seen, in height and in width.
    """
    steps = 2 * config.padding + spare + 1
    top = random_below(steps, index, seed, "top", number)
    left = random_below(steps, index, seed, "left", number)
    flip = random_below(2, index, seed, "flip", number).bool() if config.flip else torch.zeros_like(index).bool()
    return View(top, left, flip)


def apply_view(
    images: UInt8[Tensor, "b c m n"], view: View, padding: int, size: tuple[int, int] | None = None
) -> UInt8[Tensor, "b c h w"]:
    """Pad with black, crop to `size` (that of the images if left out) and flip, each by its own view, in one gather."""
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
