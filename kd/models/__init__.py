"""Networks by name. Each takes normalised images b x 3 x h x w and returns logits b x k.

A name is one of MODELS, torchvision/NAME, timm/NAME, or module:function for code of the user's own. With 0 classes it
is an embedder: the same network without its classifier, which returns its embedding b x width.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence

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
from kd.models.layout import find_stages
from kd.types import Outputs, Stages
from kd.utils.console import print_once
from kd.utils.operators import define_operators
from kd.utils.users_own import call_function, import_function, is_module_function

define_operators()  # before anything imports torchvision, as timm does

FAMILIES = (resnet, cifar_resnet, wrn, vgg, mobilenetv2, shufflenetv1, shufflenetv2)

MODELS = {name: build for family in FAMILIES for name, build in family.MODELS.items()}
"""Name -> f(num_classes, image_size, **arguments); image_size is (height, width)."""

FAMILY = {name: family for family in FAMILIES for name in family.MODELS}
FAMILY |= {f"{library}/{name}": resnet for library in ("torchvision", "timm") for name in resnet.MODELS}

STAGES = {name: family.STAGES for name, family in FAMILY.items()}
"""Name -> dotted names of the modules that output the stages' feature maps b x c x h x w, from early to late.

The maps that the literature's code compares. The one that is average-pooled into the classifier may come later."""

BEFORE_RELU = {name: family.BEFORE_RELU for name, family in FAMILY.items()}
BEFORE_RELU |= {f"timm/{name}": layers for name, layers in resnet.TIMM_BEFORE_RELU.items()}
"""Name -> the same maps before the ReLU that ends them; the part -1 of a name is the last of a module's children."""

SPARE_CLASSES = 7  # of a network that is built to lose its classifier: hardly any other layer outputs as many

DISTILLATION = "head_dist"  # timm's name for the second classifier of its distilled networks (DeiT, LeViT, ...)

LIBRARIES = {"torchvision": libraries.from_torchvision, "timm": libraries.from_timm}
"""Prefix before the slash -> f(the name after it, num_classes, image_size, arguments)."""


def stages(name: str, network: nn.Module, num_classes: int) -> Stages:
    """Where the network `name` has its features.

    The maps are known for names in STAGES and listed by timm's networks; the classifier is searched. With 0 classes the
    network has none, and its output is the embedding.
    """
    modules = {key: module for key, module in network.named_modules() if key}
    linear = {key: module for key, module in modules.items() if isinstance(module, nn.Linear)}
    classifiers = [key for key, module in linear.items() if module.out_features == num_classes]
    heads = _two_heads(classifiers)
    classifiers = [key for key in classifiers if key not in heads[1:]]
    classifier = classifiers[-1] if classifiers else None
    if name in FAMILY:
        before_relu = tuple(_numbered(layer, network) for layer in BEFORE_RELU.get(name, ()))
        return Stages(STAGES[name], classifier, tuple(modules), FAMILY[name].POOLED, before_relu, heads=heads)
    maps, tokens = find_stages(network)
    pooled = maps[-1] if maps else None  # simkd checks that the classifier takes its average
    return Stages(maps, classifier, tuple(modules), pooled, maps, tokens, heads)


def _numbered(layer: str, network: nn.Module) -> str:
    """The layer's name with the last child's name in place of -1, if the network has it."""
    before, last, after = layer.partition(".-1")
    children = [key for key, _ in dict(network.named_modules()).get(before, network).named_children()]
    return f"{before}.{children[-1]}{after}" if last and children else layer


def _two_heads(classifiers: Sequence[str]) -> tuple[str, ...]:
    """The linear layers of class and distillation, head and head_dist in timm's networks; empty without both."""
    for key in classifiers:
        path = key.split(".")
        if DISTILLATION in path:
            class_head = ".".join("head" if part == DISTILLATION else part for part in path)
            return (class_head, key) if class_head in classifiers else ()
    return ()


def head_layers(name: str, network: nn.Module, num_classes: int) -> tuple[str, ...]:
    """The layers that output the classes; several in a network of timm that has a distillation token."""
    get_classifier = getattr(network, "get_classifier", None)  # a method may have put a network of timm inside another
    if name.startswith("timm/") and get_classifier is not None:
        found = get_classifier()
        parts = found if isinstance(found, tuple) else (found,)
        named = [(key, module) for key, module in network.named_modules() if any(module is part for part in parts)]
        if names := tuple(key for key, module in named if next(module.parameters(), None) is not None):
            return names
    classifier = stages(name, network, num_classes).classifier
    return (classifier,) if classifier else ()


def classifier_layers(
    name: str, image_size: tuple[int, int], arguments: Mapping[str, object] | None = None
) -> tuple[str, ...]:
    """The layers that an embedder called `name` lacks: those over the classes; empty if it never has any."""
    try:
        with torch.random.fork_rng(devices=[]):
            network = build_model(name, SPARE_CLASSES, image_size, True, arguments)
    except UserError:  # a function of the user's own that always returns an embedder
        return ()
    return _over_classes(name, network, SPARE_CLASSES)


def without_classifier(network: nn.Module, name: str, num_classes: int) -> nn.Module:
    """The network with nn.Identity in place of its classifier, in place: it returns its embedding, b x width.

    Raises: UserError if it ends in no layer over its classes.
    """
    layers = _over_classes(name, network, num_classes)
    require(
        bool(layers),
        f"model {name}: ends in no linear layer over {num_classes} classes, so that its embedding is unknown; a"
        " module:function of your own may return the network without its classifier for num_classes=0",
    )
    for layer in layers:
        network.set_submodule(layer, nn.Identity())
    return network


def _over_classes(name: str, network: nn.Module, num_classes: int) -> tuple[str, ...]:
    """The layers that output the classes; of a network that ends in convolutions (SqueezeNet) the last one."""
    found, heads = head_layers(name, network, num_classes), stages(name, network, num_classes).heads
    if found or heads:
        return max(found, heads, key=len)  # outside timm, `head_layers` knows one of two heads
    outputs = {key: getattr(module, "out_channels", None) for key, module in network.named_modules()}
    return tuple(key for key, channels in outputs.items() if channels == num_classes)[-1:]


def check_name(name: str) -> None:
    """Raise UserError, with the nearest names, if there is no such network. Builds nothing."""
    library, _, short = name.partition("/")
    if library == "torchvision" and short:
        names = libraries.torchvision_names()
    elif library == "timm" and short:
        names = libraries.timm_names()
    elif name in MODELS or is_module_function(name):
        return
    else:
        others = "; or torchvision/NAME, timm/NAME, or module:function"
        raise UserError(f"unknown model {name!r}: {nearest(name, MODELS)}{others}")
    require(short in names, f"unknown model {name!r}: {nearest(short, names)}")


def build_model(
    name: str,
    num_classes: int,
    image_size: tuple[int, int],
    quiet: bool = False,
    arguments: Mapping[str, object] | None = None,
) -> nn.Module:
    """A network with fresh weights from torch's generator, checked to output b x num_classes for such images; with 0
    classes an embedder, checked to output b x width.

    `quiet`: without the line that says how a network of the user's own is used. `arguments`: for its constructor.

    Raises: UserError for an unknown name (with the nearest ones), a network that cannot take these images, or
    arguments that it does not take.
    """
    check_name(name)
    arguments = dict(arguments or {})
    library, _, short = name.partition("/")
    with libraries.argument_errors(name, arguments):
        built = num_classes or (0 if library == "timm" else SPARE_CLASSES)
        if name in MODELS:
            network = MODELS[name](built, image_size, **arguments)
        elif library in LIBRARIES:
            with libraries.image_errors(name, image_size):
                network = LIBRARIES[library](short, built, image_size, arguments)
        else:
            network, built = _build_users_own(name, num_classes, arguments)
        if built and not num_classes:
            without_classifier(network, name, built)
        if is_module_function(name):
            _take_logits(network, name, num_classes, image_size, quiet)
    logits = probe(network, image_size, name).logits
    wanted = f"logits of shape (2, {num_classes})" if num_classes else "an embedding of shape (2, width)"
    require(
        _fits(logits, num_classes),
        f"model {name}: outputs {_described(logits)} for 2 images; it must return {wanted},"
        " alone, first in a tuple, or as 'logits' in a dict",
    )
    return network


def _fits(logits: object, num_classes: int) -> bool:
    """Whether a network's output for two images has so many classes; without classes, whether it is an embedding."""
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != 2:
        return False
    return logits.shape[1] == num_classes if num_classes else logits.shape[1] > 0


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


def _build_users_own(name: str, num_classes: int, arguments: dict[str, object]) -> tuple[nn.Module, int]:
    """What the user's function returns, and the number of classes that it has then.

    It may refuse 0 classes: then it is built with some. Or its classifier has 0 outputs, and is removed here.
    """
    function, built = import_function(name, f"model {name}"), num_classes
    try:
        with warnings.catch_warnings():
            if num_classes == 0:
                warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
            network = call_function(function, name, f"model {name}", num_classes=num_classes, **arguments)
    except UserError:
        if num_classes:
            raise
        built = SPARE_CLASSES
        network = call_function(function, name, f"model {name}", num_classes=built, **arguments)
    called = f"{name.partition(':')[2]}(num_classes={built})"
    require(
        isinstance(network, nn.Module),
        f"model {name}: {called} returned {_described(network)}, not a torch module; return one torch.nn.Module",
    )
    if num_classes == 0 and built == 0 and _over_classes(name, network, 0):
        without_classifier(network, name, 0)
    return network, built


def _take_logits(network: nn.Module, name: str, num_classes: int, image_size: tuple[int, int], quiet: bool) -> None:
    """Make a network of the user's own that returns several things return its logits alone, and say so.

    It may do so in training only, as networks with auxiliary heads do. A hook leaves its layers their names.
    """
    answers = {"": probe(network, image_size, name).logits, " in training": _training_answer(network, image_size)}
    several = {when: answer for when, answer in answers.items() if logits_in(answer) is not answer}
    for when, answer in several.items():
        logits = logits_in(answer)
        require(
            _fits(logits, num_classes),
            f"model {name}: the network returns{when} {_described(answer)} for 2 images; its forward must return the"
            f" logits alone, or first of all: a tensor of shape (2, {num_classes or 'width'})",
        )
    if several:
        network.register_forward_hook(lambda _, images, answer: logits_in(answer))
    if several and not quiet and name not in _said:
        _said.add(name)
        when, answer = next(iter(several.items()))
        taken = "its 'logits' are" if isinstance(answer, Mapping) else "the first is"
        print_once(f"model {name}: returns{when} {_described(answer)}; {taken} taken for the logits")


@torch.no_grad()
def check_one_image(network: nn.Module, name: str, image_size: tuple[int, int]) -> None:
    """Raise UserError if the answer for a single image lacks the batch's dimension, as after squeeze()."""
    training, device = network.training, next(network.parameters()).device
    try:
        answer = logits_in(network.eval()(torch.zeros(1, 3, *image_size, device=device)))
    except Exception:  # some need two images; scoring pads its batches
        return
    finally:
        network.train(training)
    require(
        not isinstance(answer, torch.Tensor) or answer.ndim > 1,
        f"model {name}: the network returns {_described(answer)} for 1 image; leave the batch's dimension alone: write"
        " .flatten(1) in place of .squeeze()",
    )


_said: set[str] = set()  # networks of the user's own of which a line was printed


def logits_in(answer: object) -> object:
    """The logits in what a network returned: the first of a tuple or list, `logits` of a dict, else all of it."""
    if isinstance(answer, Mapping) and "logits" in answer:  # Transformers' outputs are dicts too
        return answer["logits"]
    return answer[0] if isinstance(answer, tuple | list) and answer else answer


def _training_answer(network: nn.Module, image_size: tuple[int, int]) -> object:
    """What a copy of the network returns in training; None if it cannot be copied, or does not take grey images."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return copy.deepcopy(network).train()(torch.zeros(2, 3, *image_size))
    except Exception:  # the training itself shows what is wrong
        return None


def _described(value: object) -> str:
    """What a function of the user's own returned: type, and shapes of the tensors in it."""
    if isinstance(value, torch.Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key!r}: {_described(part)}" for key, part in list(value.items())[:4])
    elif isinstance(value, tuple | list):
        inside = ", ".join(_described(part) for part in value[:4])
    else:
        return f"a {type(value).__name__}"
    more = ", ..." if len(value) > 4 else ""
    return f"a {type(value).__name__} of {len(value)} ({inside}{more})"
