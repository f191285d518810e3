"""Decode one image file to pixels, as a pure function of its bytes and the size.

Training from memory, by workers or from a stream, and an exported network all decode here and see the same pixels. No
torch here.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from kd.errors import UserError, require
from kd.utils.system import cores

VERSION = 2  # of the pixels that this module computes; part of the key of every decoded cache

DRAFT_FACTOR = 2  # a JPEG is unpacked at no less than this many times the size, if that saves work

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's names for greys of more than 8 bits

WHITE = 65535  # with 16 bits

LEAST_MAXIMUM = 4096  # below it an image has fewer bits (12, or 8) than its file has room for, and white is unknown


LISTED = 10  # broken images that a message names


class BrokenImage(UserError):
    """An image that cannot be read; `what` says which and why, without the remedy."""

    def __init__(self, what: str):
        super().__init__(f"{what}; repair or drop it, or leave it out with --skip-broken")
        self.what = what


def broken_images(found: list[str]) -> UserError:
    """The error that lists images that cannot be read, by what is said of each."""
    if len(found) == 1:
        return BrokenImage(found[0])
    listed = "; ".join(found[:LISTED]) + (f"; and {len(found) - LISTED} more" if len(found) > LISTED else "")
    return UserError(
        f"{len(found)} images cannot be read: {listed}; repair or drop them, or leave them out with --skip-broken"
    )


def decode(cell: dict | None, size: int | None, split: str, row: int) -> UInt8[np.ndarray, "3 h w"]:
    """Decode a stored image ({"bytes", "path"}) to RGB, upright; with `size`, its central square resized to that.

    Raises BrokenImage naming split, row and file if it cannot be read.
    """
    try:
        image = open_image(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"], size)
        return to_array(image if size is None else crop_and_resize(image, size, size))
    except Exception as error:  # Pillow raises many kinds; the row is at fault in all of them
        where = (cell or {}).get("path") or "no file name"
        reason = f"not a readable image ({error})"
        raise BrokenImage(f"{split} row {row} ({where}): {reason}") from error


def decode_to(
    shape: tuple[int, int], cell: dict | None, size: int | None, split: str, row: int
) -> UInt8[np.ndarray, "3 h w"]:
    """Like `decode`, but raises UserError if the result is not of `shape` (height, width) as all others are."""
    image = decode(cell, size, split, row)
    require(
        image.shape[1:] == shape,
        f"{split} row {row}: is {image.shape[2]} x {image.shape[1]}, others {shape[1]} x {shape[0]};"
        " give --image-size N to bring all to one size",
    )
    return image


def preprocess(
    source: str | Path | io.BytesIO | Image.Image, image_size: tuple[int, int], stored_size: int | None
) -> UInt8[np.ndarray, "3 h w"]:
    """An image as a network of `image_size` (height, width) is scored on it; `stored_size` as in its run.

    Raises: whatever Pillow does, of many kinds, if it is not an image.
    """
    if stored_size is None:
        return to_array(crop_and_resize(open_image(source, max(image_size)), *image_size))
    stored = to_array(crop_and_resize(open_image(source, stored_size), stored_size, stored_size))
    top, left = ((stored_size - length) // 2 for length in image_size)
    return stored[:, top : top + image_size[0], left : left + image_size[1]]


def open_image(source: str | Path | io.BytesIO | Image.Image, size: int | None = None) -> Image.Image:
    """Open an image of any kind that Pillow reads, upright and in RGB; of a JPEG unpack no more than `size` needs."""
    if isinstance(source, Image.Image):
        return to_rgb(ImageOps.exif_transpose(source))
    with Image.open(source) as image:
        if size is not None:
            image.draft(None, (DRAFT_FACTOR * size, DRAFT_FACTOR * size))  # JPEG's own halving; no effect elsewhere
        return to_rgb(ImageOps.exif_transpose(image))


def crop_and_resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crop the largest central box with the shape of height x width and resize it to that (bicubic)."""
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    # Rounding can make the box larger than the image by a last bit, which Pillow refuses.
    left, top = max(left, 0.0), max(top, 0.0)
    box = (left, top, min(left + scale * width, image.width), min(top + scale * height, image.height))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def to_array(image: Image.Image) -> UInt8[np.ndarray, "3 h w"]:
    return np.asarray(image).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. Drops transparency, as torchvision's and timm's loaders do; 16 bits keep the upper 8.

    Raises: ValueError for greys whose white is unknown, which would come out black or clipped.
    """
    if image.mode == "F":
        raise ValueError("its greys are fractions, whose white is unknown; save it with 8 bits")
    if image.mode in SIXTEEN_BIT_MODES:  # Pillow's own conversion would clip at 255
        greys = np.asarray(image)
        least, most = int(greys.min()), int(greys.max())
        if least < 0 or most > WHITE or 0 < most < LEAST_MAXIMUM:
            raise ValueError(f"its greys are {least} to {most}, and white is {WHITE}; save it with 8 bits")
        image = Image.fromarray((greys >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def pool() -> ThreadPoolExecutor:
    """Threads for decoding in parallel: Pillow releases the interpreter lock while it decodes."""
    return ThreadPoolExecutor(cores())
