"""The network of a finished run, built from model.json and its weights."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from kd.config.model_args import parse_model_args
from kd.errors import UserError, require
from kd.runs.results import checked_weights_sha256, read_model
from kd.utils.console import clip
from kd.utils.files import load_weights


class TrainedNetwork(NamedTuple):
    """A finished run's network, in eval mode on the CPU, and what it expects."""

    network: nn.Module
    info: dict  # model.json: model, num_classes, image_size, mean, std, classes, deployed
    weights_sha256: str
    summary: dict


def load_network(folder: Path, trust_code: bool) -> TrainedNetwork:
    """Load a finished run's network from safetensors and JSON; nothing is unpickled.

    Raises: UserError if the folder has no finished run, or its network is the user's own code and not trusted.
    """
    from kd.models import build_model, is_users_own
    from kd.models.adapt import resize_input

    info, summary = read_model(folder)
    require(
        trust_code or not is_users_own(info["model"]),
        f"{folder}: building {info['model']} runs its author's code; --trust-code (kd.load: trust_code=True)"
        " says that you trust it",
    )
    try:
        size = tuple(info.get("resized") or info["image_size"])
        arguments = parse_model_args(info.get("model_args"), str(folder / "model.json"))
        network = build_model(info["model"], info["num_classes"], size, quiet=True, arguments=arguments)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{folder / 'model.json'}: its network cannot be built ({clip(str(error))})") from error
    network = _rebuild(network, info, folder)
    sha256 = checked_weights_sha256(folder, summary)
    load_weights(network, folder / "model.safetensors")
    if size != tuple(info["image_size"]):
        resize_input(network, size)
    return TrainedNetwork(network.eval(), info, sha256, summary)


def _rebuild(network: nn.Module, info: dict, folder: Path) -> nn.Module:
    """The fresh network compressed as the trained one was, and inside whatever its method deploys."""
    from kd.compress import rebuild
    from kd.losses import LOSSES

    steps = {"compression": rebuild, "deployed": lambda part, recipe: LOSSES[recipe["method"]].rebuild(part, recipe)}
    for key, step in steps.items():
        if recipe := info.get(key):
            try:
                network = step(network, recipe)
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise UserError(f"{folder / 'model.json'}: {key} {recipe} cannot be rebuilt ({error!r})") from error
    return network
