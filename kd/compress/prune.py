"""Structured pruning: whole channels go, so that the network is smaller and faster wherever it runs.

The filters with the smallest magnitudes (Li et al., "Pruning Filters for Efficient ConvNets", arXiv:1608.08710), the
same share in every layer. torch-pruning finds what hangs together, as what a shortcut adds to a channel does, and
ranks it by the magnitudes of all that would go (arXiv:2301.12900), where the first paper looks at the filter alone.
"""

import torch
from rich.progress import track
from torch import nn

from kd.errors import UserError, require
from kd.models import stages
from kd.models.cost import count_macs
from kd.utils.console import console

STEPS = 100  # the most steps to the target: a percent of each layer's channels at a time


SIZES = {
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    nn.BatchNorm2d: ("num_features",),
    nn.Linear: ("in_features", "out_features"),
}
"""What makes up the shape of a layer's tensors, as far as pruning changes it."""


def prune_channels(network: nn.Module, share: float, image_size: tuple[int, int], name: str, classes: int) -> None:
    """Remove channels, in place, until at least `share` of the multiply-accumulates is gone.

    Raises: UserError where the network cannot be pruned so, or torch-pruning is missing.
    """
    library = _torch_pruning()
    refusal = f"--prune: channels of a {name} cannot be removed"
    require(_separable(network), f"{refusal}, for it shuffles or groups them; --sparsity works on any network")
    classifier = stages(name, network, classes).classifier
    require(classifier is not None, f"{refusal}, for it ends in no linear layer over the classes; --sparsity works")
    others = _other_shapes(network)
    training, total = network.training, count_macs(network, image_size)
    target = total * (1 - share)
    network.eval()
    try:
        pruner = library.pruner.BasePruner(
            network,
            torch.zeros(1, 3, *image_size),
            library.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[network.get_submodule(classifier)],
        )
        for _ in track(range(STEPS), "pruning", console=console, disable=not console.is_terminal, transient=True):
            if count_macs(network, image_size) <= target:
                break
            pruner.step()
    except Exception as error:  # the library meets anybody's network, and fails in as many ways
        raise UserError(f"{refusal} ({type(error).__name__}: {error}); --sparsity works on any network") from error
    network.train(training)
    require(
        _other_shapes(network) == others,
        f"{refusal}, for it holds other layers than convolutions, BatchNorm and linear",
    )
    left = count_macs(network, image_size)
    require(left <= target, f"--prune {share}: no more than {1 - left / total:.2f} can be removed of a {name}")


def _separable(network: nn.Module) -> bool:
    """No channel is where another one's weights are meant: no shuffle, no groups but depthwise ones."""
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
    """The sizes of every layer that pruning may change, by its dotted name."""
    return {
        name: [getattr(module, part) for part in SIZES[kind]]
        for name, module in network.named_modules()
        if (kind := _kind(module)) is not None
    }


def _other_shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Of the tensors that a recipe of sizes does not cover."""
    known = tuple(sizes(network))
    return {key: tensor.shape for key, tensor in network.state_dict().items() if key.rpartition(".")[0] not in known}


def resize(network: nn.Module, changed: dict[str, list[int]]) -> None:
    """Give layers of a fresh network other sizes, in place; their weights are zero until they are loaded.

    Raises: ValueError, AttributeError or TypeError where `changed` does not fit the network.
    """
    for name, values in changed.items():
        module = network.get_submodule(name)
        kind = _kind(module)
        if kind is None or len(values) != len(SIZES[kind]) or not all(type(v) is int and v > 0 for v in values):
            raise ValueError(f"{name} has no sizes {values}")
        for part, value in zip(SIZES[kind], values):
            setattr(module, part, value)
        for key, tensor in list(module.named_parameters(recurse=False)):
            zeros = tensor.new_zeros(_shape(module, kind, key, tensor))
            setattr(module, key, nn.Parameter(zeros, tensor.requires_grad))
        for key, tensor in list(module.named_buffers(recurse=False)):
            if tensor.ndim:  # all but the count of batches
                setattr(module, key, tensor.new_zeros(_shape(module, kind, key, tensor)))


def _kind(module: nn.Module) -> type | None:
    return next((kind for kind in SIZES if isinstance(module, kind)), None)


def _shape(module: nn.Module, kind: type, key: str, tensor: torch.Tensor) -> tuple[int, ...]:
    if kind is nn.BatchNorm2d:
        return (module.num_features,)
    into, out = (getattr(module, part) for part in SIZES[kind][:2])
    groups = module.groups if kind is nn.Conv2d else 1
    return (out, into // groups, *tensor.shape[2:]) if key == "weight" else (out,)
