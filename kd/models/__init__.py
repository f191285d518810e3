"""Networks by name. Each takes normalised images b x 3 x h x w and returns logits b x k.

A name is one of MODELS, torchvision/NAME, timm/NAME, or module:function for code of the user's own.
"""

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

libraries.define_operators()  # before anything imports torchvision, as timm does

FAMILIES = (resnet, cifar_resnet, wrn, vgg, mobilenetv2, shufflenetv1, shufflenetv2)

MODELS = {name: build for family in FAMILIES for name, build in family.MODELS.items()}
"""Name -> f(num_classes, image_size); image_size is (height, width)."""

STAGES = {name: family.STAGES for family in FAMILIES for name in family.MODELS}
STAGES |= {f"{library}/{name}": resnet.STAGES for library in ("torchvision", "timm") for name in resnet.MODELS}
"""Name -> dotted names of the modules that output the stages' feature maps b x c x h x w, from early to late.

The last map is average-pooled into the classifier, the last linear layer over the classes."""

LIBRARIES = {"torchvision": libraries.from_torchvision, "timm": libraries.from_timm}
"""Prefix before the slash -> f(the name after it, num_classes, image_size)."""


def stages(name: str, network: nn.Module, num_classes: int) -> Stages:
    """Where the network `name` has its features. The maps are known for names in STAGES, the classifier is searched."""
    modules = {key: module for key, module in network.named_modules() if key}
    linear = {key: module for key, module in modules.items() if isinstance(module, nn.Linear)}
    classifiers = [key for key, module in linear.items() if module.out_features == num_classes]
    return Stages(STAGES.get(name, ()), classifiers[-1] if classifiers else None, tuple(modules))


def is_users_own(name: str) -> bool:
    """Whether `name` is a module:function, code that is imported and run."""
    return re.fullmatch(r"[\w.]+:\w+", name) is not None


def check_name(name: str) -> None:
    """Raise UserError, with the nearest names, if there is no such network. Builds nothing."""
    library, _, short = name.partition("/")
    if library == "torchvision" and short:
        names = libraries.torchvision_names()
    elif library == "timm" and short:
        names = libraries.timm_names()
    elif name in MODELS or is_users_own(name):
        return
    else:
        others = "; or torchvision/NAME, timm/NAME, or module:function"
        raise UserError(f"unknown model {name!r}: {nearest(name, MODELS)}{others}")
    require(short in names, f"unknown model {name!r}: {nearest(short, names)}")


def build_model(name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """A network with fresh weights from torch's generator, checked to output b x num_classes for such images.

    Raises: UserError for an unknown name (with the nearest ones), or a network that cannot take these images.
    """
    check_name(name)
    library, _, short = name.partition("/")
    if name in MODELS:
        network = MODELS[name](num_classes, image_size)
    elif library in LIBRARIES:
        with libraries.image_errors(name, image_size):
            network = LIBRARIES[library](short, num_classes, image_size)
    else:
        network = _build_users_own(name, num_classes)
    logits = probe(network, image_size, name).logits
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    require(
        shape == (2, num_classes),
        f"model {name}: outputs {shape} for 2 images; it must return logits of shape (2, {num_classes})",
    )
    return network


@torch.no_grad()
def probe(network: nn.Module, image_size: tuple[int, int], name: str, layers: Sequence[str] = ()) -> Outputs:
    """The network's outputs in eval mode for two grey images. Changes neither weights nor buffers.

    Raises: UserError for an unknown layer, or images that the network cannot take.
    """
    training = network.training
    tap = Tap(network, layers)
    try:
        with libraries.image_errors(name, image_size):
            network.eval()
            return tap(torch.zeros(2, 3, *image_size, device=next(network.parameters()).device))
    finally:
        tap.remove()
        network.train(training)


def _build_users_own(name: str, num_classes: int) -> nn.Module:
    module_name, function = name.split(":")
    if str(Path.cwd()) not in sys.path:  # `python -m` would have it there
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"model {name}: cannot import {module_name} from {Path.cwd()} ({error})") from error
    require(callable(getattr(module, function, None)), f"model {name}: {module_name} has no function {function}")
    network = getattr(module, function)(num_classes=num_classes)
    require(isinstance(network, nn.Module), f"model {name}: returned {type(network).__name__}, not a torch module")
    return network
