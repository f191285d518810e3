"""One stored picture to pixels: a pure function of its bytes and the size asked for, so that every way of holding the
data gives the same ones, and an exported network sees what the trained one saw. No torch here."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from kd.errors import UserError, require
from kd.utils.system import cores

VERSION = 2  # of what the functions below do to pixels; counts in the names of what is kept decoded


FINER = 2  # a JPEG is unpacked at no less than this many times the size asked for, where that saves work


SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # what Pillow calls greys of more than 8 bits


WHITE = 65535  # in them


DIM = 4096  # a picture that keeps below this holds fewer bits (12, or 8) than its file has room for


def decode(cell: dict | None, size: int | None, split: str, row: int) -> UInt8[np.ndarray, "3 h w"]:
    """A stored image ({"bytes", "path"}) in RGB: turned upright, and its central square brought to `size` if asked.

    Raises UserError naming split, row and file where it cannot be read.
    """
    try:
        colours = open_image(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"], size)
        return pixels(colours if size is None else central(colours, size, size))
    except Exception as error:  # Pillow raises many kinds; whatever it is, the row is at fault
        where = (cell or {}).get("path") or "no file name"
        raise UserError(f"{split} row {row} ({where}) is no readable image: mend or drop it ({error})") from error


def decode_to(
    shape: tuple[int, int], cell: dict | None, size: int | None, split: str, row: int
) -> UInt8[np.ndarray, "3 h w"]:
    """As `decode`, of the (height, width) that all others have. Raises UserError naming one that is not."""
    image = decode(cell, size, split, row)
    require(
        image.shape[1:] == shape,
        f"{split} row {row} is {image.shape[2]} x {image.shape[1]}, others {shape[1]} x {shape[0]}:"
        " give --image-size N to bring all to one size",
    )
    return image


def seen(
    source: str | Path | io.BytesIO, image_size: tuple[int, int], stored_size: int | None
) -> UInt8[np.ndarray, "3 h w"]:
    """An image as a network of this image_size (height, width) is scored on it; stored_size as in the run's flags.

    Raises: whatever Pillow does, of many kinds, where it is none.
    """
    if stored_size is None:
        return pixels(central(open_image(source, max(image_size)), *image_size))
    whole = pixels(central(open_image(source, stored_size), stored_size, stored_size))
    top, left = ((stored_size - want) // 2 for want in image_size)
    return whole[:, top : top + image_size[0], left : left + image_size[1]]


def open_image(source: str | Path | io.BytesIO, size: int | None = None) -> Image.Image:
    """An image of any kind that Pillow reads, upright and in RGB; of a JPEG no more than `size` needs."""
    with Image.open(source) as image:
        if size is not None:
            image.draft(None, (FINER * size, FINER * size))  # JPEG's own halving; nothing for other formats
        return in_colour(ImageOps.exif_transpose(image))


def central(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest part around the centre that has the shape of height x width, brought to that size (bicubic)."""
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    # Rounding can make the part larger than the image by a last bit, which Pillow refuses.
    left, top = max(left, 0.0), max(top, 0.0)
    box = (left, top, min(left + scale * width, image.width), min(top + scale * height, image.height))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def pixels(image: Image.Image) -> UInt8[np.ndarray, "3 h w"]:
    return np.asarray(image).transpose(2, 0, 1)


def in_colour(image: Image.Image) -> Image.Image:
    """RGB of any mode. Transparency is dropped, as torchvision's and timm's loaders do; 16 bits keep their upper 8.

    Raises: ValueError for greys whose white nobody knows, which would come out black or cut off.
    """
    if image.mode == "F":
        raise ValueError("its greys are fractions, whose white is unknown; save it with 8 bits")
    if image.mode in SIXTEEN_BITS:  # Pillow's own conversion would cut off at 255 instead
        greys = np.asarray(image)
        least, most = int(greys.min()), int(greys.max())
        if least < 0 or most > WHITE or 0 < most < DIM:
            raise ValueError(f"its greys are {least} to {most}, and white is {WHITE}; save it with 8 bits")
        image = Image.fromarray((greys >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def pool() -> ThreadPoolExecutor:
    """Threads that decode side by side: Pillow lets go of the interpreter while it works."""
    return ThreadPoolExecutor(cores())
