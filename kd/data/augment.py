"""Augment a whole batch at a time, by what kd/data/draws.py has drawn for each image.

Crops, flips, policies and colours work on stored images (uint8, decoded and resized), so that every storage gives the
same pixels and a crop has no more detail than --stored-size keeps; mixing and erasing work on normalised images.

On a GPU the number of kernels counts, not their size: what is the same for every batch is kept on the device, and what
differs by image alone is drawn for many batches at once.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kd.config import ViewConfig
from kd.data.draws import Boxes, CropFlip, Drawn, Edges, Factors, Mixing
from kd.data.policies import GREY, apply_policy, change_drawn, grey
from kd.utils.constants import made_once
from kd.utils.floats import widest

VERSION = 1
"""Of the views that flags, seed, number and row give. Whoever changes a draw raises it, or caches of a teacher's logits
would answer for other views; tests/data/test_view_version.py compares every flag's views with recorded ones."""

CUTOUT_COLOUR = (125, 123, 114)  # a grey, as in FixMatch's code and that of the methods with two views

GREY_STEPS = 2**16  # per level: greys are rounded to these before summing; float32 has no finer ones at 255


def augment(
    config: ViewConfig, images: UInt8[Tensor, "b c m n"], drawn: Drawn, size: tuple[int, int]
) -> UInt8[Tensor, "b c h w"]:
    """The view of stored `images` that was drawn, cropped to `size` (height, width).

    In the order of torchvision's recipes: crop, flip, policy, colours, blur.
    """
    if drawn.boxes is not None:
        images = resized_crop(images, drawn.boxes, size)
    if drawn.crop is not None:
        images = crop_and_flip(images, drawn.crop, config.padding, size)
    if drawn.policy is not None:
        images = apply_policy(images, drawn.policy)
    if drawn.factors is not None:
        images = jitter(images, drawn.factors)
    if drawn.hue is not None:
        images = turn_hue(images, drawn.hue)
    if drawn.grey is not None:
        images = change_drawn(images, drawn.grey, lambda rows: grey(rows).to(torch.uint8).expand_as(rows))
    if drawn.blur is not None:
        images = change_drawn(images, drawn.blur.chosen, blur, drawn.blur.across, drawn.blur.down)
    return images


def augment_strongly(
    config: ViewConfig, images: UInt8[Tensor, "b c m n"], drawn: Drawn, size: tuple[int, int]
) -> UInt8[Tensor, "b c h w"]:
    """The strong view, of methods with two: augmented as the weak one by draws of its own, then by FixMatch's
    RandAugment and a grey square.

    As in the code of MLKD and CRLD: its RandAugment(2, 10) never reads the 10, but draws every strength anew, and ends
    with a grey square. With --strong-magnitude, torchvision's RandAugment in its place.
    """
    images = apply_policy(augment(config, images, drawn, size), drawn.strong.policy)
    return images if drawn.strong.cut_out is None else cut_out(images, drawn.strong.cut_out)


def cut_out(images: UInt8[Tensor, "b 3 h w"], squares: Edges) -> UInt8[Tensor, "b 3 h w"]:
    """Paint a grey square into each image (arXiv:1708.04552)."""
    return torch.where(covered(squares, images.shape[2:])[:, None], _cutout_colour(images.device), images)


@made_once
def _cutout_colour(device: torch.device) -> UInt8[Tensor, "3 1 1"]:
    return torch.tensor(CUTOUT_COLOUR, dtype=torch.uint8, device=device)[:, None, None]


def crop_and_flip(
    images: UInt8[Tensor, "b c m n"], view: CropFlip, padding: int, size: tuple[int, int] | None = None
) -> UInt8[Tensor, "b c h w"]:
    """Pad with black, crop to `size` (the images' own if left out) and flip, in one gather."""
    b, c = images.shape[:2]
    h, w = size or images.shape[2:]
    padded = F.pad(images, (padding, padding, padding, padding)) if padding else images
    rows = _places(view.top, view.upside_down, h)
    columns = _places(view.left, view.flip, w)
    sample = _count(b, images.device)[:, None, None, None]
    channel = _count(c, images.device)[:, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _places(first: Int[Tensor, "b"], mirrored: Bool[Tensor, "b"] | None, length: int) -> Int[Tensor, "b n"]:
    """`length` places from the first on, of mirrored images from the last to the first."""
    along = _count(length, first.device)
    if mirrored is None:
        return first[:, None] + along
    return first[:, None] + torch.where(mirrored[:, None], _count_down(length, first.device), along)


@made_once
def _count(length: int, device: torch.device) -> Int[Tensor, "n"]:
    return torch.arange(length, device=device)


@made_once
def _count_down(length: int, device: torch.device) -> Int[Tensor, "n"]:
    return torch.arange(length, device=device).flip(0)


def resized_crop(images: UInt8[Tensor, "b c m n"], boxes: Boxes, size: tuple[int, int]) -> UInt8[Tensor, "b c h w"]:
    """Crop each image to its box and resize that to `size` (height, width), bilinearly.

    Differs from torchvision: no antialiasing of a box larger than `size`, which only --stored-size makes possible.
    """
    axes = []
    for start, length, stored, seen in zip(boxes[:2], boxes[2:], images.shape[2:], size):
        # Clamped to the box: pixels beside it must not be interpolated in.
        within = (_centres(seen, images.device) * length[:, None] - 0.5).clamp(min=0).minimum(length[:, None] - 1)
        axes.append((start[:, None] + within) * (2 / max(stored - 1, 1)) - 1)
    rows, columns = axes
    grid = torch.stack([columns[:, None, :].expand(-1, size[0], -1), rows[:, :, None].expand(-1, -1, size[1])], dim=3)
    resized = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return resized.round().to(torch.uint8)


@made_once
def _centres(pixels: int, device: torch.device) -> Float[Tensor, "n"]:
    """Where the pixels of an axis are, as shares of it."""
    return (torch.arange(pixels, device=device) + 0.5) / pixels


def jitter(images: UInt8[Tensor, "b 3 h w"], factors: Factors) -> UInt8[Tensor, "b 3 h w"]:
    """Change brightness, then contrast about the mean grey, then saturation about each pixel's own grey.

    Differs from torchvision: always in this order.
    """
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in factors)
    changed = (images * brightness).clamp(0, 255)
    # Summed as integers: the rounding of a float sum depends on how threads split it, and so on the batch.
    steps = (_grey(changed) * GREY_STEPS).round().long()
    mean = steps.sum(dim=(1, 2, 3), keepdim=True).to(widest(images.device)) / (GREY_STEPS * steps[0].numel())
    changed = _scale_about(changed, mean.float(), contrast)
    changed = _scale_about(changed, _grey(changed), saturation)
    return changed.round().to(torch.uint8)


def _grey(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    red, green, blue = (images * _grey_shares(images.device)).split(1, dim=1)
    return red + green + blue


@made_once
def _grey_shares(device: torch.device) -> Float[Tensor, "3 1 1"]:
    return torch.tensor([weight / 10_000 for weight in GREY], dtype=torch.float32, device=device)[:, None, None]


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
    place = (sextant[:, None] + _hue_offsets(images.device)) % 6
    nearness = torch.minimum(place, 4 - place).clamp(0, 1)
    return (brightest[:, None] - spread[:, None] * nearness).round().to(torch.uint8)


@made_once
def _hue_offsets(device: torch.device) -> Int[Tensor, "3 1 1"]:
    return torch.tensor([5, 3, 1], device=device)[:, None, None]  # of red, green, blue


def blur(
    images: UInt8[Tensor, "b 3 h w"], across: Float[Tensor, "b r"], down: Float[Tensor, "b q"]
) -> UInt8[Tensor, "b 3 h w"]:
    """Blur by the weights of Gaussians (kd.data.draws.blur_weights), with mirrored borders."""
    pixels = images.float()
    for axis, weights in ((3, across), (2, down)):
        reach, length = weights.shape[1] - 1, images.shape[axis]
        weights = weights[:, :, None, None, None]
        padded = F.pad(pixels, (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach), mode="reflect")
        pixels = weights[:, 0] * pixels
        for step in range(1, reach + 1):
            sides = padded.narrow(axis, reach - step, length) + padded.narrow(axis, reach + step, length)
            pixels = pixels + weights[:, step] * sides
    return pixels.round().to(torch.uint8)


def mix(
    images: Float[Tensor, "b c h w"], partners: Float[Tensor, "b c h w"], mixing: Mixing
) -> Float[Tensor, "b c h w"]:
    """Blend each normalised image with its partner (mixup), or paste a box of the partner into it (cutmix)."""
    pasted = mixing.box and torch.where(covered(mixing.box, images.shape[2:])[:, None], partners, images)
    if mixing.box is not None and mixing.paste is None:
        return pasted
    blended = torch.lerp(partners, images, mixing.weight[:, None, None, None])
    return blended if pasted is None else torch.where(mixing.paste[:, None, None, None], pasted, blended)


def erase(images: Float[Tensor, "b c h w"], boxes: Edges) -> Float[Tensor, "b c h w"]:
    """Set a box of each normalised image to the mean (0)."""
    return images.masked_fill(covered(boxes, images.shape[2:])[:, None], 0)


def covered(edges: Edges, size: tuple[int, int]) -> Bool[Tensor, "b h w"]:
    """The pixels that a rectangle covers, of images of `size` (height, width)."""
    inside = []
    for start, end, length in zip(edges[::2], edges[1::2], size, strict=True):
        place = _count(length, start.device)
        inside.append((place >= start[:, None]) & (place < end[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]
