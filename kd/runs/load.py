"""The network of a finished run, built from model.json and its weights."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from kd.config.methods import MethodFlags
from kd.config.model_args import parse_model_args
from kd.errors import UserError, require
from kd.runs.results import checked_weights_sha256, read_model, weights_file
from kd.utils.console import clip
from kd.utils.files import load_weights


class TrainedNetwork(NamedTuple):
    """A finished run's network, in eval mode on the CPU, and what it expects."""

    network: nn.Module
    info: dict  # model.json: model, num_classes, image_size, mean, std, classes, deployed
    weights_sha256: str
    summary: dict


def load_network(folder: Path, trust_code: bool, weights: str = "last") -> TrainedNetwork:
    """Load a finished run's network from safetensors and JSON; nothing is unpickled.

    `weights`: "last", "best" (on validation) or "ema". Raises: UserError if the folder has no finished run or no such
    weights, or its network is the user's own code and not trusted.
    """
    from kd.config import METHODS, named_method
    from kd.models import build_model, is_module_function
    from kd.models.adapt import resize_input

    info, summary = read_model(folder)
    own = [name for name in (info["model"], _deployed_by(info)) if is_module_function(name)]
    require(
        trust_code or not own,
        f"{folder}: building {' and '.join(own)} runs its author's code; --trust-code (kd.load: trust_code=True)"
        " says that you trust it",
    )
    try:
        size = tuple(info.get("resized") or info["image_size"])
        arguments = parse_model_args(info.get("model_args"), str(folder / "model.json"))
        with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, though the file's replace them
            network = build_model(info["model"], info["num_classes"], size, quiet=True, arguments=arguments)
            network = _rebuild(network, info, folder, named_method if trust_code else METHODS.__getitem__)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{folder / 'model.json'}: its network cannot be built ({clip(str(error))})") from error
    sha256 = checked_weights_sha256(folder, summary, weights)
    load_weights(network, weights_file(folder, weights))
    if size != tuple(info["image_size"]):
        resize_input(network, size)
    return TrainedNetwork(network.eval(), info, sha256, summary)


def _deployed_by(info: dict) -> str:
    """The name of the method that added to the network; empty if none did."""
    recipe = info.get("deployed")
    return str(recipe.get("method")) if isinstance(recipe, dict) else ""


def _rebuild(network: nn.Module, info: dict, folder: Path, method: Callable[[str], type[MethodFlags]]) -> nn.Module:
    """The fresh network compressed as the trained one was, and inside whatever its method deploys.

    `method` finds a method's flags by its name.
    """
    from kd.compress import rebuild
    from kd.losses import loss_class

    def deploy(part: nn.Module, recipe: dict) -> nn.Module:
        return loss_class(method(recipe["method"])).rebuild(part, recipe)

    steps = {"compression": rebuild, "deployed": deploy}
    for key, step in steps.items():
        if recipe := info.get(key):
            try:
                network = step(network, recipe)
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise UserError(f"{folder / 'model.json'}: {key} {recipe} cannot be rebuilt ({error!r})") from error
    return network
