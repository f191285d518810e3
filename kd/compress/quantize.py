"""Low precision: weights and activations rounded to few levels as they are used, with gradients as if they were not.

The students of Apprentice (Mishra & Marr, arXiv:1711.05852), whose levels are those of WRPN (arXiv:1709.01134):
2^(bits-1) - 1 steps on either side of zero for weights, 2^bits - 1 steps for activations.

Differs from the papers, which clip weights to [-1, 1] and activations to [0, 1] for networks trained that way from the
start: here each output channel has a scale of its own and each image its own range, so that a trained network can be
rounded too, ranges are no state that could be lost, and what an image is answered does not depend on its batch.

On top of torch's parametrizations. torchao's quantisation-aware training knows linear layers and embeddings; its graph
mode has convolutions, but captures the whole network by torch.export, which few networks of other people's survive.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

TERNARY_THRESHOLD = 0.7  # of a channel's mean magnitude; Li et al., arXiv:1605.04711


TINY = torch.finfo(torch.float32).tiny


def rounded_weight(weight: Float[Tensor, "n *rest"], bits: int) -> Float[Tensor, "n *rest"]:
    """Each output channel on at most 2^bits - 1 levels, symmetric around an exact zero.

    8 and 4 bits: equal steps up to the channel's largest magnitude. 2 bits: -s, 0 and s, WRPN's ternary case, with
    the threshold and the scale s that come closest to the channel in mean square (arXiv:1605.04711).
    """
    channel = weight.flatten(1)
    size = channel.abs()
    if bits == 2:
        large = size > TERNARY_THRESHOLD * size.mean(dim=1, keepdim=True)
        scale = (size * large).sum(dim=1, keepdim=True) / large.sum(dim=1, keepdim=True).clamp(min=1)
        level = channel.sign() * large
    else:
        scale = (size.amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=TINY)
        level = (channel / scale).round()
    return (level * scale).view_as(weight)


def rounded_activation(x: Float[Tensor, "b *rest"], bits: int) -> Float[Tensor, "b *rest"]:
    """Each image's values on 2^bits equal steps over their range, which always holds an exact zero, for padding.

    The affine scheme of Jacob et al. (arXiv:1712.05877, section 2.1).
    """
    within = tuple(range(1, x.ndim))
    low, high = x.amin(dim=within, keepdim=True).clamp(max=0), x.amax(dim=within, keepdim=True).clamp(min=0)
    most = 2**bits - 1
    step = ((high - low) / most).clamp(min=TINY)
    zero = (-low / step).round()
    return (((x / step).round() + zero).clamp(0, most) - zero) * step


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` to the last bit, with the gradient of `x` (Bengio et al., arXiv:1308.3432)."""
    return rounded.detach() + (x - x.detach())


class Quantized(nn.Module):
    """The parametrization of a weight."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def forward(self, weight: Float[Tensor, "n *rest"]) -> Float[Tensor, "n *rest"]:
        return straight_through(weight, rounded_weight(weight, self.bits))


def quantize_weights(network: nn.Module, layers: tuple[str, ...], bits: int) -> None:
    for name in layers:
        register_parametrization(network.get_submodule(name), "weight", Quantized(bits))


def quantize_activations(network: nn.Module, layers: tuple[str, ...], bits: int) -> None:
    """Round what enters the layers. By hooks, so that modules keep their names and a plain network's weights fit."""
    for name in layers:
        network.get_submodule(name).register_forward_pre_hook(partial(_round_input, bits))


def _round_input(bits: int, module: nn.Module, inputs: tuple) -> tuple:
    x = inputs[0]
    return (straight_through(x, rounded_activation(x.float(), bits).to(x.dtype)), *inputs[1:])
