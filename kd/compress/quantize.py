"""Quantisation-aware training: weights and activations are rounded in the forward pass, gradients ignore the rounding.

The levels are those of Apprentice (Mishra & Marr, arXiv:1711.05852) and WRPN (arXiv:1709.01134): 2^(bits-1) - 1 steps
on either side of zero for weights, 2^bits - 1 steps for activations.

Differs from the papers, which clip weights to [-1, 1] and activations to [0, 1] and train from scratch: here each
output channel has its own scale and each image its own range. So a trained network can be rounded too, ranges are not
state to save, and an image's logits do not depend on its batch.

Uses torch's parametrizations. torchao's quantisation-aware training supports only linear layers and embeddings; its
graph mode supports convolutions, but needs torch.export, which fails on many networks.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

TERNARY_THRESHOLD = 0.7  # times a channel's mean magnitude; Li et al., arXiv:1605.04711
TINY = torch.finfo(torch.float32).tiny


def rounded_weight(weight: Float[Tensor, "n *rest"], bits: int) -> Float[Tensor, "n *rest"]:
    """Each output channel rounded to at most 2^bits - 1 levels, symmetric around an exact zero.

    8 and 4 bits: equal steps up to the channel's largest magnitude. 2 bits: -s, 0 and s, WRPN's ternary case, with
    the threshold and scale s that approximate the channel best in mean square (arXiv:1605.04711).
    """
    channel = weight.flatten(1)
    magnitude = channel.abs()
    if bits == 2:
        large = magnitude > TERNARY_THRESHOLD * magnitude.mean(dim=1, keepdim=True)
        scale = (magnitude * large).sum(dim=1, keepdim=True) / large.sum(dim=1, keepdim=True).clamp(min=1)
        level = channel.sign() * large
    else:
        scale = (magnitude.amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=TINY)
        level = (channel / scale).round()
    return (level * scale).view_as(weight)


def rounded_activation(x: Float[Tensor, "b *rest"], bits: int) -> Float[Tensor, "b *rest"]:
    """Each image's values rounded to 2^bits equally spaced levels over their range, with an exact zero for padding.

    The affine scheme of Jacob et al. (arXiv:1712.05877, section 2.1).
    """
    dims = tuple(range(1, x.ndim))
    low, high = x.amin(dim=dims, keepdim=True).clamp(max=0), x.amax(dim=dims, keepdim=True).clamp(min=0)
    steps = 2**bits - 1
    step = ((high - low) / steps).clamp(min=TINY)
    zero = (-low / step).round()
    return (((x / step).round() + zero).clamp(0, steps) - zero) * step


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, bit for bit, with the gradient of `x` (Bengio et al., arXiv:1308.3432)."""
    return rounded.detach() + (x - x.detach())


class Quantized(nn.Module):
    """Parametrization that rounds a weight."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def forward(self, weight: Float[Tensor, "n *rest"]) -> Float[Tensor, "n *rest"]:
        return straight_through(weight, rounded_weight(weight, self.bits))


def quantize_weights(network: nn.Module, layers: tuple[str, ...], bits: int) -> None:
    for name in layers:
        register_parametrization(network.get_submodule(name), "weight", Quantized(bits))


def quantize_activations(network: nn.Module, layers: tuple[str, ...], bits: int) -> None:
    """Round the layers' inputs. Done by hooks, so that modules keep their names and a plain network's weights fit."""
    for name in layers:
        network.get_submodule(name).register_forward_pre_hook(partial(_round_input, bits))


def _round_input(bits: int, module: nn.Module, inputs: tuple) -> tuple:
    x = inputs[0]
    return (straight_through(x, rounded_activation(x.float(), bits).to(x.dtype)), *inputs[1:])
