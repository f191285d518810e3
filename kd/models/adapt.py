"""Layers put before a pretrained network, so that it takes the student's images: other normalisation, other size.
And BatchNorm over all processes in place of a network's own."""

import sys

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.errors import require


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
    resize = Resize(size).forward  # as a module outside of the network, it could not be traced, nor BatchNorm folded
    network.register_forward_pre_hook(lambda _, images: resize(*images), prepend=True)


HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def synchronise_batchnorm(network: nn.Module) -> None:
    """Make each BatchNorm normalise over the batches of all processes, in place; hooks on it stay.

    timm's BatchNorm with an activation inside becomes timm's own. Raises: UserError as check_batchnorm.
    """
    check_batchnorm(network)
    before, timm = dict(network.named_modules()), sys.modules.get("timm")  # if it built the network, it is imported
    convert = timm.layers.convert_sync_batchnorm if timm else nn.SyncBatchNorm.convert_sync_batchnorm
    convert(network)
    for name, module in network.named_modules():
        old = before.get(name, module)
        if old is not module:
            for kind in HOOKS:
                getattr(module, kind).update(getattr(old, kind))


def check_batchnorm(network: nn.Module) -> None:
    """Raises UserError for a BatchNorm that computes something else too: a conversion would leave that out."""
    timm, norm = sys.modules.get("timm"), nn.modules.batchnorm._BatchNorm
    own = (timm.layers.BatchNormAct2d,) if timm else ()
    norms = {name: module for name, module in network.named_modules() if isinstance(module, norm)}
    usual = (norm.forward, nn.SyncBatchNorm.forward)
    other = [name for name, each in norms.items() if not isinstance(each, own) and type(each).forward not in usual]
    names = ", ".join(other[:3])
    require(not other, f"--sync-batchnorm: {names} computes more than BatchNorm does; leave the flag out")
