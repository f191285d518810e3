"""What a finished run holds for others: its summary, its weights, and the network built from them."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from kd.errors import UserError, require
from kd.files import load_weights, read_json, sha256_file
from kd.model_info import check_info


class Trained(NamedTuple):
    """A finished run's network, in eval mode on the CPU, and what it expects."""

    network: nn.Module
    info: dict  # model.json: model, num_classes, image_size, mean, std, classes, deployed
    weights_sha256: str
    summary: dict


def finished(path: Path, tested: bool = False) -> dict | None:
    """A finished run's summary; with `tested`, of one that has read the test split as well."""
    if not (path / "summary.json").exists():
        return None
    summary = read_json(path / "summary.json")
    finished = summary.get("status") == "finished" and not (tested and summary.get("test_top1") is None)
    return summary if finished else None


def read_model(folder: Path) -> tuple[dict, dict]:
    """A finished run's model.json and summary.json. Raises UserError where the folder holds none."""
    require(folder.is_dir(), f"{folder}: no such run folder")
    summary = finished(folder)
    require(summary is not None, f"{folder} is no finished run: it has no summary.json; finish it with --resume")
    require(isinstance(summary.get("model"), str), f"{folder / 'summary.json'} names no model")
    info = read_json(folder / "model.json")
    check_info(folder / "model.json", info)
    return info, summary


def weights_of(folder: Path) -> str:
    """The sha256 of a finished run's weights. Raises UserError where the folder holds none, or others."""
    _, summary = read_model(folder)
    return _checked(folder, summary)


def _checked(folder: Path, summary: dict) -> str:
    """The sha256 of the weights, seen to be the one that the run wrote down (since it does)."""
    path = folder / "model.safetensors"
    require(path.is_file(), f"{path} is not there: copy the whole run folder")
    sha256 = sha256_file(path)
    same = summary.get("weights_sha256", sha256) == sha256
    require(same, f"{path} changed since its run wrote it: copy the run folder again, or train it anew")
    return sha256


def load_network(folder: Path, trust_code: bool) -> Trained:
    """Read a finished run's network from safetensors and JSON; nothing is unpickled.

    Raises: UserError where the folder is no finished run, or its network is code of the user's own and not trusted.
    """
    from kd.adapt import take
    from kd.models import build_model, is_users_own

    info, summary = read_model(folder)
    require(
        trust_code or not is_users_own(info["model"]),
        f"{folder}: building {info['model']} runs its author's code; --trust-code (kd.load: trust_code=True)"
        " says that you trust it",
    )
    try:
        size = tuple(info.get("resized") or info["image_size"])
        network = build_model(info["model"], info["num_classes"], size)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{folder / 'model.json'}: its network cannot be built ({str(error)[:200]})") from error
    network = _rebuilt(network, info, folder)
    sha256 = _checked(folder, summary)
    load_weights(network, folder / "model.safetensors")
    if size != tuple(info["image_size"]):
        take(network, size)
    return Trained(network.eval(), info, sha256, summary)


def _rebuilt(network: nn.Module, info: dict, folder: Path) -> nn.Module:
    """What became of the fresh network: compressed, or a part of what a method deploys."""
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
