"""Which layers of a network are compressed: all convolutions and linear layers but the first and the last."""

from functools import partial

from torch import Tensor, nn

from kd.errors import require
from kd.models import probe

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
    hooks = [module.register_forward_hook(partial(_note, called, key)) for key, module in layers.items()]
    try:
        probe(network, image_size, name)
    finally:
        for hook in hooks:
            hook.remove()
    order = tuple(dict.fromkeys(called))
    require(len(order) > 2, f"model {name}: has no layer between its first and its last one, so nothing to compress")
    return order[1:-1]


def _note(called: list[str], key: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    called.append(key)
