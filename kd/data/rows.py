"""What the rest of the project asks of a split, however its images are held."""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kd.utils import rng

BLOCK = 1024  # rows that are looked at together


ROOM = 0.5  # share of a GPU's free memory that the data may take; the rest is for the networks


class Rows(ABC):
    """Images and labels of one split, asked for by row number."""

    labels: Int[Tensor, "n"]

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width of the images as they are held."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Of what the rows hold, in their order."""

    @abstractmethod
    def batches(self, indices: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """The images (uint8 b x 3 x h x w) of each of `indices` (b) in turn, on the device; what comes next is fetched
        meanwhile."""

    def order(self, seed: int, epoch: int) -> Int[Tensor, "n"]:
        """The order in which an epoch visits the rows."""
        return rng.order(seed, epoch, len(self.labels))

    def sample(self, count: int) -> Int[Tensor, "k"]:
        """Some rows from all over the split."""
        return torch.linspace(0, len(self.labels) - 1, count).long()

    def on(self, device: torch.device) -> "Rows":
        """The rows, moved to the device if they can be and fit. Indices are best where `labels` are then."""
        return self


class Selected:
    """Images of a split that are fetched when they are asked for; selected by a mask, as an array of them would be.

    A frozen dataclass with `rows`, which of the stored ones, and `sides`, the height and width that each gets.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.rows), 3, *self.sides)

    def __getitem__(self, mask: np.ndarray) -> "Selected":
        return dataclasses.replace(self, rows=self.rows[mask])


@dataclass(frozen=True)
class Split(Rows):
    """Decoded images in memory, or in a memory map."""

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

    def batches(self, indices: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        for index in indices:
            yield gather(self.images, index, device)

    def on(self, device: torch.device) -> "Split":
        images = place_on(self.images, device)
        return Split(images, self.labels.to(images.device))


@dataclass(frozen=True)
class Mapped(Rows):
    """Some rows of a memory map, which other splits and this machine's other processes share: nothing is copied."""

    stored: UInt8[Tensor, "m 3 h w"]
    rows: Int[Tensor, "n"]  # which of the stored ones
    labels: Int[Tensor, "n"]

    @property
    def images(self) -> UInt8[Tensor, "n 3 h w"]:
        """A copy of them all."""
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

    def batches(self, indices: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        for index in indices:
            yield gather(self.stored, self.rows[index.cpu()], device)

    def on(self, device: torch.device) -> Rows:
        return self if device.type == "cpu" else Split(self.images, self.labels).on(device)


def iter_centred(
    split: Rows, size: tuple[int, int], index: Int[Tensor, "k"], chunk: int
) -> Iterator[UInt8[Tensor, "b 3 h w"]]:
    """Pixels as networks are scored on them, `chunk` rows at a time, however they are held."""
    for images in split.batches(list(index.split(chunk)), torch.device("cpu")):
        yield centre(images, size)


def place_on(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device if it fits there, else in host memory."""
    if device.type == "cuda" and tensor.nbytes > ROOM * torch.cuda.mem_get_info(device)[0]:
        return tensor
    return tensor.to(device)


def gather(tensor: Tensor, index: Int[Tensor, "b"], device: torch.device) -> Tensor:
    """Rows of a tensor that may lie elsewhere, on the device."""
    found = tensor[index.to(tensor.device)]
    if found.device.type != device.type:  # from pinned memory the copy runs beside the arithmetic
        found = found.pin_memory()
    return found.to(device, non_blocking=True)


def centre(images: UInt8[Tensor, "b c m n"], size: tuple[int, int]) -> UInt8[Tensor, "b c h w"]:
    """What is seen of images where nothing is random: their middle, of `size` (height, width)."""
    top, left = ((have - want) // 2 for have, want in zip(images.shape[2:], size))
    return images[:, :, top : top + size[0], left : left + size[1]]


def normalize(
    images: UInt8[Tensor, "b c h w"], mean: Float[Tensor, "c"], std: Float[Tensor, "c"]
) -> Float[Tensor, "b c h w"]:
    """Pixels 0..255 to float32 of the training set's mean 0 and deviation 1; `mean` and `std` are shares of 255."""
    scale = 1 / (255 * std)
    return images.float() * scale[:, None, None] - (mean / std)[:, None, None]
