"""Unstructured pruning: the smallest weights stay zero while the others are trained on (Han et al., arXiv:1506.02626).

Differs from the paper: one ranking over all layers instead of a threshold per layer. Layers differ in how many weights
they can spare, and of the simple rules this one does best (Blalock et al., arXiv:2003.03033).

Also `inner_layers`, the layers to sparsify or quantise: every convolution and linear layer except the first and last.
"""

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from kd.errors import require
from kd.models import head_layers, probe

KINDS = (nn.Conv2d, nn.Linear)


class Masked(nn.Module):
    """Parametrization that masks a weight. The mask is a buffer, so checkpoints include it."""

    def __init__(self, mask: Bool[Tensor, "n *rest"]):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Float[Tensor, "n *rest"]) -> Float[Tensor, "n *rest"]:
        return torch.where(self.mask, weight, 0.0)


def masks(weights: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Name -> mask, False for the share `sparsity` of smallest weights over all tensors (of equals, the first ones).

    Raises: UserError if a tensor would lose all its weights.
    """
    order = torch.cat([weight.detach().abs().flatten() for weight in weights.values()]).argsort(stable=True)
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[order[: round(sparsity * len(order))]] = False
    parts = kept.split([weight.numel() for weight in weights.values()])
    masks_by_name = {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts)}
    empty = [name for name, mask in masks_by_name.items() if not mask.any()]
    require(not empty, f"--sparsity {sparsity}: would set every weight of {', '.join(empty)} to zero; give less")
    return masks_by_name


def sparsify(network: nn.Module, layers: tuple[str, ...], sparsity: float) -> None:
    """Set the layers' smallest weights to zero, and keep them zero during training."""
    modules = {name: network.get_submodule(name) for name in layers}
    for name, mask in masks({name: module.weight for name, module in modules.items()}, sparsity).items():
        register_parametrization(modules[name], "weight", Masked(mask))


def inner_layers(network: nn.Module, image_size: tuple[int, int], name: str, classes: int) -> tuple[str, ...]:
    """Dotted names of the layers to compress, in the order in which they run.

    The first and the last layer, of two heads over the classes both, stay as they are, as in arXiv:1711.05852 and
    arXiv:1709.01134: they have few of the weights, and rounding them costs the most accuracy. Layers that never run as
    a module, such as the projections in nn.MultiheadAttention, are left out.
    Raises: UserError if no layer is left, or one computes its weight from others (weight norm).
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
    require(len(order) > 2, f"model {name}: has no layer between its first and its last one to compress")
    heads = head_layers(name, network, classes)
    inner = tuple(layer for layer in order[1:-1] if layer not in heads)
    require(bool(inner), f"model {name}: has no layer between its first and its last one to compress")
    own = [layer for layer in inner if is_parametrized(layers[layer])]
    require(not own, f"model {name}: {', '.join(own[:3])} has a parametrization of its own; compress it without")
    return inner


def _append_name(called: list[str], key: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    called.append(key)
