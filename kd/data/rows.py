"""One split of the data by row number, the same whether its images are in memory, decoded by workers or streamed."""

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kd.errors import require
from kd.utils import rng

BLOCK = 1024  # rows that are hashed at a time

DEVICE_SHARE = 0.5  # share of a GPU's free memory that the data may take; the rest is for the networks


class Rows(ABC):
    """Images and labels of one split, by row number."""

    labels: Int[Tensor, "n"]

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width of the stored images."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hash of the rows' content, in their order."""

    @property
    def content_sha256(self) -> str | None:
        """Hash of the images in any order, without their labels; None if that would take decoding them."""
        return None

    @property
    def labels_sha256(self) -> str:
        return hashlib.sha256(self.labels.cpu().numpy()).hexdigest()

    @abstractmethod
    def batches(self, indices: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """The images (uint8 b x 3 x h x w) of each index (b) in `indices`, on the device; prefetches the next ones."""

    def order(self, seed: int, epoch: int) -> Int[Tensor, "n"]:
        """The order in which an epoch visits the rows."""
        return rng.order(seed, epoch, len(self.labels))

    def sample(self, count: int) -> Int[Tensor, "k"]:
        """`count` rows from all over the split."""
        return torch.linspace(0, len(self.labels) - 1, count).long()

    def on(self, device: torch.device) -> "Rows":
        """The rows, moved to the device if they fit there. Indexing is fastest from the device of `labels`."""
        return self

    def close(self) -> None:
        """End what is kept between epochs, such as worker processes; `batches` starts it again."""
        return


class LazyImages:
    """Images of a split that are read when they are needed; a mask selects from them as from an array.

    A frozen dataclass with `rows`, the numbers of these images in the stored split, and `image_size`, their height and
    width.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.rows), 3, *self.image_size)

    def __getitem__(self, mask: np.ndarray) -> "LazyImages":
        return dataclasses.replace(self, rows=self.rows[mask])


@dataclass(frozen=True)
class Split(Rows):
    """A split whose decoded images are one tensor, in memory or a memory map."""

    images: UInt8[Tensor, "n 3 h w"]
    labels: Int[Tensor, "n"]

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.images.shape[2:])

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in (self.images, self.labels):
            digest.update(part.numpy())
        return digest.hexdigest()

    @property
    def content_sha256(self) -> str:
        return _unordered_sha256(self.images.split(BLOCK))

    def batches(self, indices: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        for index in indices:
            yield gather(self.images, index, device)

    def on(self, device: torch.device) -> "Split":
        images = place_on(self.images, device)
        return Split(images, self.labels.to(images.device))


@dataclass(frozen=True)
class MappedRows(Rows):
    """A split that is some rows of a memory map, without a copy: other splits and processes share the map."""

    stored: UInt8[Tensor, "m 3 h w"]
    rows: Int[Tensor, "n"]  # numbers of these rows in `stored`
    labels: Int[Tensor, "n"]

    @property
    def images(self) -> UInt8[Tensor, "n 3 h w"]:
        """A copy of all images."""
        return self.stored[self.rows]

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.stored.shape[2:])

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for rows in self.rows.split(BLOCK):
            digest.update(self.stored[rows].numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()

    @property
    def content_sha256(self) -> str:
        return _unordered_sha256(self.stored[rows] for rows in self.rows.split(BLOCK))

    def batches(self, indices: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        for index in indices:
            yield gather(self.stored, self.rows[index.cpu()], device)

    def on(self, device: torch.device) -> Rows:
        """The map itself if its rows do not fit; else they are copied in parts, without a copy in the host's memory."""
        size = len(self.rows) * math.prod(self.stored.shape[1:])
        if device.type == "cpu" or not fits(size, device):
            return self
        return Split(copy_rows(self.stored, self.rows, device), self.labels.to(device))


def _unordered_sha256(blocks: Iterable[UInt8[Tensor, "b 3 h w"]]) -> str:
    """Hash of the images of all blocks, the same in any order."""
    each = sorted(hashlib.sha256(image).digest() for block in blocks for image in block.cpu().numpy())
    return hashlib.sha256(b"".join(each)).hexdigest()


def iter_centre_crops(
    split: Rows, size: tuple[int, int], index: Int[Tensor, "k"], chunk: int
) -> Iterator[UInt8[Tensor, "b 3 h w"]]:
    """Pixels of the rows `index` as networks are scored on them, `chunk` rows at a time."""
    for images in split.batches(list(index.split(chunk)), torch.device("cpu")):
        yield centre_crop(images, size)


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes fit in the device's memory, beside the networks."""
    if device.type != "cuda":
        return True
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, of an earlier training
    return size <= DEVICE_SHARE * (torch.cuda.mem_get_info(device)[0] + kept)


def copy_rows(
    stored: UInt8[Tensor, "m c h w"], rows: Int[Tensor, "n"], device: torch.device
) -> UInt8[Tensor, "n c h w"]:
    """These rows on the device, copied there in parts of few bytes."""
    images = torch.empty(len(rows), *stored.shape[1:], dtype=stored.dtype, device=device)
    for part, numbers in zip(images.split(BLOCK), rows.split(BLOCK)):
        part.copy_(stored[numbers])
    return images


def place_on(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device if it fits there, else where it is."""
    return tensor.to(device) if fits(tensor.nbytes, device) else tensor


def gather(tensor: Tensor, index: Int[Tensor, "b"], device: torch.device) -> Tensor:
    """Rows of a tensor on any device, copied to `device`."""
    return to_device(tensor[index.to(tensor.device)], device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of this batch or epoch on the device; the host does not wait for the copy."""
    if tensor.device.type != device.type:  # from pinned memory the copy overlaps with computation
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def centre_crop(images: UInt8[Tensor, "b c m n"], size: tuple[int, int]) -> UInt8[Tensor, "b c h w"]:
    """The central part of `size` (height, width), on which networks are scored. Raises UserError for smaller images."""
    (stored_height, stored_width), (height, width) = images.shape[2:], size
    require(
        stored_height >= height and stored_width >= width,
        f"images of {stored_width} x {stored_height} pixels have no centre of {width} x {height}; give --image-size N"
        " to bring all to one size",
    )
    top, left = (stored_height - height) // 2, (stored_width - width) // 2
    return images[:, :, top : top + height, left : left + width]


def normalize(
    images: UInt8[Tensor, "b c h w"], mean: Float[Tensor, "c"], std: Float[Tensor, "c"]
) -> Float[Tensor, "b c h w"]:
    """Pixels 0..255 to float32 with the training set's mean at 0 and deviation 1; `mean`, `std` as shares of 255."""
    return scaled(images, *scale_and_shift(mean, std))


def scale_and_shift(
    mean: Float[Tensor, "c"], std: Float[Tensor, "c"]
) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
    """What `scaled` needs to normalise: the same for every batch."""
    return (1 / (255 * std))[:, None, None], (mean / std)[:, None, None]


def scaled(
    images: UInt8[Tensor, "b c h w"], scale: Float[Tensor, "c 1 1"], shift: Float[Tensor, "c 1 1"]
) -> Float[Tensor, "b c h w"]:
    return (images * scale).sub_(shift)
