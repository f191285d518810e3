"""Unstructured pruning: the smallest weights are zero for good and the others learn on (Han et al., arXiv:1506.02626).

One ranking over all layers decides, where the paper has a threshold for each: layers differ in how many weights they
can spare, and of the simple rules this one does best (Blalock et al., arXiv:2003.03033).
"""

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from kd.errors import require
from kd.models import probe


class Masked(nn.Module):
    """The parametrization of a weight; its mask is a buffer and so a part of every checkpoint."""

    def __init__(self, mask: Bool[Tensor, "n *rest"]):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Float[Tensor, "n *rest"]) -> Float[Tensor, "n *rest"]:
        return torch.where(self.mask, weight, 0.0)


def masks(weights: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """True for the weights that stay: all but the share `sparsity` of the smallest, of equals the first.

    Raises: UserError where a layer would be left without any.
    """
    order = torch.cat([weight.detach().abs().flatten() for weight in weights.values()]).argsort(stable=True)
    stays = torch.ones(len(order), dtype=torch.bool)
    stays[order[: round(sparsity * len(order))]] = False
    parts = stays.split([weight.numel() for weight in weights.values()])
    found = {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts)}
    empty = [name for name, mask in found.items() if not mask.any()]
    require(not empty, f"--sparsity {sparsity}: would leave nothing of {', '.join(empty)}; give less")
    return found


def sparsify(network: nn.Module, layers: tuple[str, ...], sparsity: float) -> None:
    """Hold the smallest weights of the layers at zero, from now on."""
    modules = {name: network.get_submodule(name) for name in layers}
    for name, mask in masks({name: module.weight for name, module in modules.items()}, sparsity).items():
        register_parametrization(modules[name], "weight", Masked(mask))


#: (kd.compress.layers) Which layers of a network are compressed: all convolutions and linear layers but the first and the last.


KINDS = (nn.Conv2d, nn.Linear)


def inner_layers(network: nn.Module, image_size: tuple[int, int], name: str) -> tuple[str, ...]:
    """Dotted names, in the order in which two grey images run through them.

    The first layer reads the image and the last one gives the logits: both stay as they are (arXiv:1711.05852 and
    arXiv:1709.01134 do the same), for they hold few of the weights and most of what rounding harms. A layer that is
    never called as a module, such as attention's own projections, is left out.
    Raises: UserError where nothing is left.
    """
    called: list[str] = []
    layers = {key: module for key, module in network.named_modules() if isinstance(module, KINDS)}
    hooks = [module.register_forward_hook(partial(_append_name, called, key)) for key, module in layers.items()]
    try:
        probe(network, image_size, name)
    finally:
        for hook in hooks:
            hook.remove()
    order = tuple(dict.fromkeys(called))
    require(len(order) > 2, f"model {name}: has no layer between its first and its last one, so nothing to compress")
    return order[1:-1]


def _append_name(called: list[str], key: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    called.append(key)
