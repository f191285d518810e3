"""Networks by name. Every one takes normalised images b x 3 x h x w and returns logits b x k."""

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from kd.errors import UserError, nearest, require
from kd.models import (
    cifar_resnet,
    libraries,
    mobilenetv2,
    resnet,
    shufflenetv1,
    shufflenetv2,
    vgg,
    wrn,
)
from kd.models.features import Tap
from kd.types import Outputs, Stages

libraries.define()  # before the first import of torchvision, timm's included


FAMILIES = (resnet, cifar_resnet, wrn, vgg, mobilenetv2, shufflenetv1, shufflenetv2)


MODELS = {name: build for family in FAMILIES for name, build in family.MODELS.items()}
"""Name -> f(num_classes, image_size); image_size is (height, width)."""


STAGES = {name: family.STAGES for family in FAMILIES for name in family.MODELS}


STAGES |= {f"{library}/{name}": resnet.STAGES for library in ("torchvision", "timm") for name in resnet.MODELS}
"""Name -> dotted names of the modules that give the stages' feature maps b x c x h x w, from early to late.

The last one is what is average-pooled into the classifier, the last linear layer over the classes."""


LIBRARIES = {"torchvision": libraries.from_torchvision, "timm": libraries.from_timm}
"""What stands before the slash -> f(the name behind it, num_classes, image_size)."""


def stages(name: str, network: nn.Module, num_classes: int) -> Stages:
    """Where the network `name` has its features; for one that names no stages only the classifier is found."""
    modules = {key: part for key, part in network.named_modules() if key}
    linear = {key: part for key, part in modules.items() if isinstance(part, nn.Linear)}
    heads = [key for key, part in linear.items() if part.out_features == num_classes]
    return Stages(STAGES.get(name, ()), heads[-1] if heads else None, tuple(modules))


def is_users_own(name: str) -> bool:
    """Whether `name` is a module:function, which is code to import and run."""
    return re.fullmatch(r"[\w.]+:\w+", name) is not None


def check_name(name: str) -> None:
    """Raises UserError, with the nearest names, where there is no such network; builds nothing."""
    family, _, short = name.partition("/")
    if family == "torchvision" and short:
        names = libraries.torchvision_names()
    elif family == "timm" and short:
        names = libraries.timm_names()
    elif name in MODELS or is_users_own(name):
        return
    else:
        families = "; or torchvision/NAME, timm/NAME, or module:function"
        raise UserError(f"unknown model {name!r}: {nearest(name, MODELS)}{families}")
    require(short in names, f"unknown model {name!r}: {nearest(short, names)}")


def build_model(name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """A network with fresh weights from torch's generator, seen to give b x num_classes for a batch of such images.

    Raises: UserError for an unknown name (with the nearest ones), or a network that cannot take these images.
    """
    check_name(name)
    family, _, short = name.partition("/")
    if name in MODELS:
        network = MODELS[name](num_classes, image_size)
    elif family in LIBRARIES:
        with libraries.taking_images(name, image_size):
            network = LIBRARIES[family](short, num_classes, image_size)
    else:
        network = _users_own(name, num_classes)
    logits = probe(network, image_size, name).logits
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    require(shape == (2, num_classes), f"model {name}: gives {shape} for 2 images; logits of (2, {num_classes}) wanted")
    return network


@torch.no_grad()
def probe(network: nn.Module, image_size: tuple[int, int], name: str, layers: Sequence[str] = ()) -> Outputs:
    """What the network gives, in eval mode, for two grey images; its weights and buffers are untouched.

    Raises: UserError for layers that it does not have, or images that it cannot take.
    """
    training = network.training
    tap = Tap(network, layers)
    try:
        with libraries.taking_images(name, image_size):
            network.eval()
            return tap(torch.zeros(2, 3, *image_size, device=next(network.parameters()).device))
    finally:
        tap.remove()
        network.train(training)


def _users_own(name: str, num_classes: int) -> nn.Module:
    module_name, function = name.split(":")
    if str(Path.cwd()) not in sys.path:  # as `python -m` would
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"model {name}: cannot import {module_name} from here ({error})") from error
    require(callable(getattr(module, function, None)), f"model {name}: {module_name} has no function {function}")
    network = getattr(module, function)(num_classes=num_classes)
    require(isinstance(network, nn.Module), f"model {name}: returned {type(network).__name__}, not a torch module")
    return network
