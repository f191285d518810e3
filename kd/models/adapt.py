"""A teacher's network made to answer for the student's data: its normalisation, its image size, its classes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.data import Data


class Renormalize(nn.Module):
    """From the student's normalisation to the teacher's own."""

    def __init__(self, ours: tuple, theirs: tuple):
        super().__init__()
        mean, std, their_mean, their_std = (torch.tensor(part)[:, None, None] for part in (*ours, *theirs))
        self.register_buffer("scale", std / their_std, persistent=False)
        self.register_buffer("shift", (mean - their_mean) / their_std, persistent=False)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return image * self.scale + self.shift


class Resize(nn.Module):
    """The very view that the student sees, at the size that the teacher takes."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return F.interpolate(image, self.size, mode="bilinear", antialias=True)


def resized(network: nn.Module, size: tuple[int, int], data: Data) -> None:
    """Make it take the data's images, where it expects another size."""
    if size != tuple(data.size):
        resize_input(network, size)


def resize_input(network: nn.Module, size: tuple[int, int]) -> None:
    """Bring whatever enters the network to `size` first, before what it may do to images already."""
    resize = Resize(size)
    network.register_forward_pre_hook(lambda _, images: resize(*images), prepend=True)
