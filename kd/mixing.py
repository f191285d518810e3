"""Mixup, cutmix and random erasing as views: partner, share and box are functions of (seed, number, sample index),
never of the batch, so that a teacher's answer to a mixed image can be kept and found again."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd.config import ViewConfig
from kd.views import random_below, random_share

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
    box = _box(side, side, size, index, seed, "cutmix box", number, clipped=True) & paste[:, None, None]
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
    box = _box(high, wide, size, index, seed, "erase box", number, clipped=False) & chosen[:, None, None]
    return image.masked_fill(box[:, None], 0)


def _box(
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
