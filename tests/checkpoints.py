"""Checkpoints as other people's training scripts save them, made from networks of ours."""

from collections.abc import Callable, Mapping

from torch import Tensor

BLOCK = ("shortcut", "downsample")


def as_downsample(name: str) -> str:
    """The literature's name of a ResNet's shortcut."""
    return name.replace(*BLOCK)


def renamed(weights: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(name): tensor for name, tensor in weights.items()}


def in_other_words(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the same order, under keys that say nothing but weight, bias, running_mean, ..."""
    modules: dict[str, str] = {}
    for name in weights:
        modules.setdefault(name.rpartition(".")[0], f"block{len(modules) // 5}.layer.{len(modules)}")
    return renamed(weights, lambda name: f"{modules[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}")


def without_counters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As code before torch 0.4.1 saved BatchNorm."""
    return {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}


def wrapped(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return renamed(weights, lambda name: prefix + name)
