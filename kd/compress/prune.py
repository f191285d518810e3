"""Structured pruning: removes whole channels, so that the network is smaller and faster on any hardware.

Removes the filters with the smallest magnitudes, the same share in every layer (Li et al., "Pruning Filters for
Efficient ConvNets", arXiv:1608.08710). torch-pruning finds the groups of channels that only go together, such as those
that a shortcut adds. Differs from the paper: ranks a group by the magnitudes of all weights that would go
(arXiv:2301.12900), not by the filter's alone.
"""

import torch
from rich.progress import track
from torch import nn

from kd.errors import UserError, require
from kd.models import stages
from kd.models.cost import count_macs
from kd.utils.console import console

STEPS = 100  # at most, to the target; each removes a percent of every layer's channels

SIZES = {
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    nn.BatchNorm2d: ("num_features",),
    nn.Linear: ("in_features", "out_features"),
}
"""The attributes that pruning changes, and that determine the shapes of a layer's tensors."""


def prune_channels(network: nn.Module, share: float, image_size: tuple[int, int], name: str, classes: int) -> None:
    """Remove channels in place until at least `share` of the multiply-accumulates is gone.

    Raises: UserError if the network cannot be pruned this way, or torch-pruning is missing.
    """
    torch_pruning = _torch_pruning()
    refusal, remedy = f"--prune: cannot remove channels of {name}", "use --sparsity, which works on any network"
    require(_separable(network), f"{refusal}: it shuffles or groups them; {remedy}")
    classifier = stages(name, network, classes).classifier
    require(classifier is not None, f"{refusal}: it does not end in a linear layer over the classes; {remedy}")
    other_shapes = _other_shapes(network)
    training, total = network.training, count_macs(network, image_size)
    target = total * (1 - share)
    network.eval()
    try:
        pruner = torch_pruning.pruner.BasePruner(
            network,
            torch.zeros(1, 3, *image_size),
            torch_pruning.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[network.get_submodule(classifier)],
        )
        for _ in track(range(STEPS), "pruning", console=console, disable=not console.is_terminal, transient=True):
            if count_macs(network, image_size) <= target:
                break
            pruner.step()
    except Exception as error:  # the library raises anything, depending on the network
        raise UserError(f"{refusal} ({type(error).__name__}: {error}); {remedy}") from error
    network.train(training)
    require(
        _other_shapes(network) == other_shapes,
        f"{refusal}: it has layers other than convolutions, BatchNorm and linear ones; {remedy}",
    )
    left = count_macs(network, image_size)
    require(left <= target, f"--prune {share}: at most {1 - left / total:.2f} of {name} can be removed; give less")


def _separable(network: nn.Module) -> bool:
    """Whether channels can be removed one by one: no channel shuffle, and no groups except depthwise ones."""
    modules = list(network.modules())
    grouped = [module.groups not in (1, module.in_channels) for module in modules if isinstance(module, nn.Conv2d)]
    return not any(grouped) and not any(isinstance(module, nn.ChannelShuffle) for module in modules)


def _torch_pruning():
    try:
        import torch_pruning
    except ImportError as error:
        raise UserError("--prune needs torch-pruning: pip install -e '.[compress]'") from error
    return torch_pruning


def sizes(network: nn.Module) -> dict[str, list[int]]:
    """Dotted name -> sizes of every layer that pruning may change, in the order of SIZES."""
    return {
        name: [getattr(module, attribute) for attribute in SIZES[kind]]
        for name, module in network.named_modules()
        if (kind := _kind(module)) is not None
    }


def _other_shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the tensors of all other layers, which a recipe of sizes cannot rebuild."""
    layers = tuple(sizes(network))
    return {key: tensor.shape for key, tensor in network.state_dict().items() if key.rpartition(".")[0] not in layers}


def resize(network: nn.Module, changed: dict[str, list[int]]) -> None:
    """Change the sizes of a fresh network's layers in place; their weights are zero until loaded.

    Raises: ValueError, AttributeError or TypeError if `changed` does not fit the network.
    """
    for name, values in changed.items():
        module = network.get_submodule(name)
        kind = _kind(module)
        if kind is None or len(values) != len(SIZES[kind]) or not all(type(v) is int and v > 0 for v in values):
            raise ValueError(f"{name} has no sizes {values}")
        for attribute, value in zip(SIZES[kind], values):
            setattr(module, attribute, value)
        for key, tensor in list(module.named_parameters(recurse=False)):
            zeros = tensor.new_zeros(_shape(module, kind, key, tensor))
            setattr(module, key, nn.Parameter(zeros, tensor.requires_grad))
        for key, tensor in list(module.named_buffers(recurse=False)):
            if tensor.ndim:  # not BatchNorm's count of batches
                setattr(module, key, tensor.new_zeros(_shape(module, kind, key, tensor)))


def _kind(module: nn.Module) -> type | None:
    return next((kind for kind in SIZES if isinstance(module, kind)), None)


def _shape(module: nn.Module, kind: type, key: str, tensor: torch.Tensor) -> tuple[int, ...]:
    if kind is nn.BatchNorm2d:
        return (module.num_features,)
    size_in, size_out = (getattr(module, attribute) for attribute in SIZES[kind][:2])
    groups = module.groups if kind is nn.Conv2d else 1
    return (size_out, size_in // groups, *tensor.shape[2:]) if key == "weight" else (size_out,)
