"""Compressed networks: pruned channels, sparse weights, few bits; compressing a network, and rebuilding one."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from kd.compress.prune import prune_channels, resize, sizes
from kd.compress.quantize import Quantized, quantize_activations, quantize_weights
from kd.compress.sparsity import Masked, inner_layers, sparsify
from kd.config import Job
from kd.models.cost import count_macs

__all__ = ["compress", "compression_summary", "plain_weights", "rebuild", "sizes"]

SCALE_BYTES = 4  # per channel


def compress(network: nn.Module, job: Job, image_size: tuple[int, int], classes: int, fresh_sizes: dict) -> dict:
    """Remove channels, mask weights, and round weights and activations in place, by the settings in `job.compress`.

    `fresh_sizes`: the layers' sizes in a newly built network, from `sizes`. Returns the recipe for model.json; empty if
    nothing is compressed. A pure function of the job and the weights, so that a resumed run builds the network that its
    checkpoint fits. Raises: UserError if the network cannot be compressed this way.
    """
    config = job.compress
    if not config.asked:
        return {}
    macs_before = count_macs(network, image_size)
    if config.prune:
        prune_channels(network, config.prune, image_size, job.model, classes)
    changed = {name: values for name, values in sizes(network).items() if values != fresh_sizes[name]}
    recipe = {"shapes": changed, "macs_before": macs_before, "layers": []}
    recipe |= {key: getattr(config, key) for key in ("weight_bits", "activation_bits", "sparsity")}
    if config.sparsity or config.weight_bits < 32 or config.activation_bits < 32:
        layers = inner_layers(network, image_size, job.model, classes)
        recipe["layers"] = list(layers)
        if config.sparsity:
            sparsify(network, layers, config.sparsity)
        if config.weight_bits < 32:  # after masking: zero is one of the levels, so masked weights stay zero
            quantize_weights(network, layers, config.weight_bits)
        if config.activation_bits < 32:
            quantize_activations(network, layers, config.activation_bits)
    return recipe


def rebuild(network: nn.Module, recipe: dict) -> nn.Module:
    """The compressed network without its weights, from a fresh one.

    Weights need neither masks nor rounding again: saved ones have their zeros and levels already.
    """
    resize(network, recipe["shapes"])
    if recipe["activation_bits"] < 32:
        quantize_activations(network, tuple(recipe["layers"]), recipe["activation_bits"])
    return network


@torch.no_grad()
def plain_weights(network: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State dict under the plain network's names, with rounded and masked values; `state` defaults to network's own.

    Parametrizations that the network brings itself (weight norm) stay: a new network has them too.
    """
    weights = dict(network.state_dict() if state is None else state)
    for name, module in network.named_modules():
        for tensor, chain in module.parametrizations.items() if is_parametrized(module) else ():
            if not _is_ours(chain):
                continue
            prefix = f"{name}.parametrizations.{tensor}."
            parts = {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}
            weights[f"{name}.{tensor}"] = functional_call(chain, parts, ())
    return weights


def _is_ours(chain: Iterable[nn.Module]) -> bool:
    return all(isinstance(part, Masked | Quantized) for part in chain)


@torch.no_grad()
def compression_summary(network: nn.Module, job: Job, recipe: dict, image_size: tuple[int, int]) -> dict:
    """summary.json's keys for a compressed network; empty for any other.

    `sparsity` is the measured share of zeros in the compressed layers' weights; `macs` includes multiplications by
    zero. `packed_bytes`: parameters and buffers if each weight took its bits, plus one scale per channel.
    """
    if not recipe:
        return {}
    weights = plain_weights(network)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    zeros = counted = 0
    for name, module in network.named_modules():
        if not is_parametrized(module, "weight") or not _is_ours(module.parametrizations["weight"]):
            continue
        weight, chain = weights[f"{name}.weight"], list(module.parametrizations["weight"])
        bits = next((part.bits for part in chain if isinstance(part, Quantized)), 32)
        if bits < 32:
            total += weight.numel() * bits // 8 + len(weight) * SCALE_BYTES - weight.numel() * weight.element_size()
        zeros, counted = zeros + int((weight == 0).sum()), counted + weight.numel()
    return {
        "init": job.compress.init,
        "weight_bits": recipe["weight_bits"],
        "activation_bits": recipe["activation_bits"],
        "sparsity": zeros / counted if counted else 0.0,
        "macs": count_macs(network, image_size),
        "macs_before": recipe["macs_before"],
        "packed_bytes": total,
    }
