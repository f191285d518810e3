"""A teacher's network made to answer for the student's data: its normalisation, its image size, its classes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.data import Data
from kd.errors import UserError
from kd.foreign import match_classes


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


def adapt(network: nn.Module, info: dict, data: Data, device: torch.device, who: str, remedy: str) -> None:
    """Freeze it and make it answer for `data`, by hooks, so that its layers keep their names.

    `info` is what it expects: mean, std, image_size, classes. Raises UserError, which says `who` it is and what the
    `remedy` is, where it lacks a class.
    """
    theirs, ours = tuple(info["classes"]), data.classes
    columns = match_classes(theirs, ours)
    if columns is None:
        missing = [name for name in ours if name not in theirs]
        lacks = f"not {', '.join(map(repr, missing[:3]))} of" if missing else "some of these names twice; of"
        raise UserError(f"{who} knows {len(theirs)} classes and {lacks} the data's {len(ours)}: {remedy}")
    if (tuple(info["mean"]), tuple(info["std"])) != (data.mean, data.std):
        renormalize = Renormalize((data.mean, data.std), (info["mean"], info["std"])).to(device)
        network.register_forward_pre_hook(lambda _, images: renormalize(*images))
    resized(network, tuple(info["image_size"]), data)
    if columns != list(range(len(theirs))):  # by name: ours may come in another order, or be some of theirs
        chosen = torch.tensor(columns, device=device)
        network.register_forward_hook(lambda _, images, logits: logits[:, chosen])
    network.eval().requires_grad_(False).to(device)


def resized(network: nn.Module, size: tuple[int, int], data: Data) -> None:
    """Make it take the data's images, where it expects another size."""
    if size != tuple(data.size):
        take(network, size)


def take(network: nn.Module, size: tuple[int, int]) -> None:
    """Bring whatever enters the network to `size` first, before what it may do to images already."""
    resize = Resize(size)
    network.register_forward_pre_hook(lambda _, images: resize(*images), prepend=True)
