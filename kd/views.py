"""Random choices as pure functions of (seed, number, sample index): the same on every device, for any number of
processes, and after any resume. There is no random state anywhere in training that has to be saved."""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kd.config import ViewConfig

_MASK = 0xFFFFFFFF


@torch.compiler.assume_constant_result
def derive(*words: int | str) -> int:
    """A seed of 63 bits from a purpose: derive(seed, "network")."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(*words: int | str) -> None:
    """Seed Python's, NumPy's and torch's generators for a purpose (numpy takes 32 bits)."""
    set_seed(derive(*words) & _MASK)


def _mix(bits: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    # A 32-bit finaliser of full avalanche ("lowbias32", Wellons 2018), held in int64: products wrap modulo 2^64 on
    # every device alike, and the low 32 bits of a wrapped product are right.
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _MASK
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _MASK
    return bits ^ (bits >> 16)


def random_bits(index: Int[Tensor, "*n"], *words: int | str) -> Int[Tensor, "*n"]:
    """32 random bits for each index: independent for different words (a seed, an epoch, a purpose, ...)."""
    key = derive(*words)
    return _mix(_mix(_mix(index & _MASK) ^ (key & _MASK)) ^ (key >> 32))


def random_below(limit: int, index: Int[Tensor, "*n"], *words: int | str) -> Int[Tensor, "*n"]:
    """A whole number from 0 up to `limit` for each index, all equally likely to within 2^-32 * limit."""
    return (random_bits(index, *words) * limit) >> 32


def random_share(index: Int[Tensor, "*n"], *words: int | str) -> Float[Tensor, "*n"]:
    """A number from 0 up to 1 for each index, on a grid of 2^-24 (exact in float32 on every device)."""
    return (random_bits(index, *words) >> 8).float() * 2.0**-24


def order(seed: int, epoch: int, size: int) -> Int[Tensor, "n"]:
    """The order in which an epoch visits the samples."""
    bits = random_bits(torch.arange(size), seed, "order", epoch)
    return torch.argsort(bits, stable=True)


def which(config: ViewConfig, seed: int, epoch: int) -> tuple[int, int]:
    """What an epoch's views follow from: (seed, number). With --views K they repeat and do not depend on --seed."""
    return (config.view_seed, epoch % config.count) if config.count else (seed, epoch)


class View(NamedTuple):
    """What is done to each image of a batch."""

    top: Int[Tensor, "b"]  # first row of the crop within the padded image
    left: Int[Tensor, "b"]
    flip: Bool[Tensor, "b"]


def view(config: ViewConfig, seed: int, number: int, index: Int[Tensor, "b"], spare: int = 0) -> View:
    """The view `number` (the epoch, where every epoch has its own) of the samples `index`.

    `spare`: pixels by which the images are held larger than they are seen, in height and in width.
    """
    steps = 2 * config.padding + spare + 1
    top = random_below(steps, index, seed, "top", number)
    left = random_below(steps, index, seed, "left", number)
    flip = random_below(2, index, seed, "flip", number).bool() if config.flip else torch.zeros_like(index).bool()
    return View(top, left, flip)


def centre(images: UInt8[Tensor, "b c m n"], size: tuple[int, int]) -> UInt8[Tensor, "b c h w"]:
    """What is seen of images where nothing is random: their middle, of `size` (height, width)."""
    top, left = ((have - want) // 2 for have, want in zip(images.shape[2:], size))
    return images[:, :, top : top + size[0], left : left + size[1]]


def apply(
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


def normalize(
    images: UInt8[Tensor, "b c h w"], mean: Float[Tensor, "c"], std: Float[Tensor, "c"]
) -> Float[Tensor, "b c h w"]:
    """Pixels 0..255 to float32 of the training set's mean 0 and deviation 1; `mean` and `std` are shares of 255."""
    scale = 1 / (255 * std)
    return images.float() * scale[:, None, None] - (mean / std)[:, None, None]


def seed_step(seed: int, step: int, process: int) -> None:
    """What dropout and the like draw in a step; different on each process, the same after a resume."""
    torch.manual_seed(derive(seed, "step", step, process))
