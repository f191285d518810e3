"""Layers put before a pretrained network, so that it takes the student's images: other normalisation, other size."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Renormalize(nn.Module):
    """From one normalisation to another, each given as (mean, std)."""

    def __init__(self, given: tuple, expected: tuple):
        super().__init__()
        mean, std, expected_mean, expected_std = (torch.tensor(part)[:, None, None] for part in (*given, *expected))
        self.register_buffer("scale", std / expected_std, persistent=False)
        self.register_buffer("shift", (mean - expected_mean) / expected_std, persistent=False)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return image * self.scale + self.shift


class Resize(nn.Module):
    """Bilinear resize to `size`; a teacher thus sees the same crop and flip as the student."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return F.interpolate(image, self.size, mode="bilinear", antialias=True)


def resize_input(network: nn.Module, size: tuple[int, int]) -> None:
    """Resize images to `size` before anything else that happens to the network's input."""
    resize = Resize(size)
    network.register_forward_pre_hook(lambda _, images: resize(*images), prepend=True)
