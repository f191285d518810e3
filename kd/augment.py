"""Random resized crops and colour jitter as views: functions of (seed, number, sample index), a whole batch at a time.

They work on the images as they are held, decoded and brought to one size, so that they see the same pixels however the
data is held; a crop therefore holds no detail that --stored-size has not kept.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kd.views import random_share

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


def boxes(smallest: float, size: tuple[int, int], index: Int[Tensor, "b"], seed: int, number: int) -> Boxes:
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


def factors(strength: float, index: Int[Tensor, "b"], seed: int, number: int) -> Factors:
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
