"""Networks trained elsewhere: pretrained ones of torchvision and timm, files of weights, folders of Transformers.

A file of weights needs FILE.json beside it: the image size and normalisation that its network expects, and its classes.
Nothing in a file is run (kd.models.weights).
"""

import hashlib
import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd.config import Origin
from kd.config.model_args import asked_size, format_model_args, parse_model_args
from kd.errors import UserError, require
from kd.models import (
    LIBRARIES,
    MODELS,
    build_model,
    check_name,
    classifier_layers,
    head_layers,
    libraries,
    without_classifier,
)
from kd.models.weights import SUFFIXES, Weights, find_fit, misfit, read_file, read_folder, rows_of_head
from kd.utils.console import clip, one_line, print_once
from kd.utils.files import is_list, is_number, not_finite, read_json
from kd.utils.system import expand_user

NEW_HEAD_ADVICE = "--fine-tune-teacher trains a new last layer for them"

RESCALES_IMAGES = ("googlenet", "inception_v3")  # inside the network, if pretrained
EXPECTED_JSON = (
    '{"image_size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "classes": [...]}'
)

PREPARED = {
    "do_rescale": True,
    "rescale_offset": False,
    "do_normalize": True,
    "include_top": False,  # EfficientNet's: divides by the deviation once more
    "do_flip_channel_order": False,
}
"""Keys of a preprocessor_config.json, and the only values by which images are prepared as kd does it."""
PIXEL = 1 / 255  # to which its rescale_factor must scale


class Flags(NamedTuple):
    """The flags that name weights and the network of a file of weights, for messages."""

    weights: str = "--teacher"
    model: str = "--teacher-model"


TEACHER = Flags()


class Expected(NamedTuple):
    """What a network expects of its images, and the names of its classes."""

    classes: tuple[str, ...]  # empty if unknown
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Pretrained(NamedTuple):
    """A network trained elsewhere, with what it expects."""

    model: str  # a name for build_model
    weights: dict[str, Tensor]
    classes: tuple[str, ...]  # empty if unknown
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ordered: bool = True  # whether weights of other names may be matched in their order
    notes: tuple[str, ...] = ()  # what was chosen and left out of a file
    saved_by: str = ""  # the class of a Transformers folder
    model_args: str | None = None  # for the constructor of `model`
    flags: Flags = TEACHER  # that named it

    @property
    def sha256(self) -> str:
        """Of everything that its logits depend on: model, weights and expectations."""
        expected = [self.classes, self.image_size, self.mean, self.std]
        arguments = [sorted(parse_model_args(self.model_args).items())] if self.model_args else []  # as ever without
        digest = hashlib.sha256(json.dumps([self.model, *expected, *arguments]).encode())
        for name in sorted(self.weights):
            digest.update(name.encode())
            digest.update(self.weights[name].contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def is_pretrained(name: str) -> bool:
    """Whether --teacher or --init names no run: torchvision/NAME, timm/NAME, a file of weights, a folder of timm's."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return is_transformers_folder(path)
    return is_of_library(name) or path.suffix in SUFFIXES or path.is_file()


def is_of_library(name: str) -> bool:
    """Whether it is torchvision/NAME or timm/NAME, and no folder or file of that name is there."""
    library, _, short = name.partition("/")
    path = Path(name)
    return library in LIBRARIES and bool(short) and not path.is_file() and not path.is_dir()


def check_pretrained(
    name: str, model: str, new_head: bool = False, flags: Flags = TEACHER, model_args: str | None = None
) -> None:
    """Raise UserError if `name` cannot be used, as far as that shows without the data and without fetching anything.

    A file's weights are read and fitted to the network `model`; how they fit is printed. `new_head`: the last layer is
    trained anew, so its classes do not matter.
    """
    if is_of_library(name):
        _check_library(name, flags)
        return
    pretrained = load_pretrained(name, model, flags, model_args)
    if not new_head:
        _require_classes(pretrained, name)
    with torch.random.fork_rng(devices=[]):
        classes = rows_of_head(_weights(pretrained)) or 10 if new_head else len(pretrained.classes)
        network = _build(pretrained, classes, quiet=True)
        heads = head_layers(pretrained.model, network, classes) if new_head else ()
        notes = load_into(network, pretrained, name, heads)
    for note in (*pretrained.notes, *(f"{flags.weights} {name}: {note}" for note in notes)):
        print_once(note)


def check_embedder(name: str, model: str, model_args: str | None = None) -> None:
    """As check_pretrained, for a --teacher that is used without its classifier."""
    if is_of_library(name):
        _check_library(name, TEACHER)
        return
    pretrained = load_pretrained(name, model, model_args=model_args)
    with torch.random.fork_rng(devices=[]):
        build_embedder(pretrained, name)
    for note in pretrained.notes:
        print_once(note)


def _check_library(name: str, flags: Flags) -> None:
    library, _, short = name.partition("/")
    check_name(name)
    rescales = library == "torchvision" and short in RESCALES_IMAGES
    require(not rescales, f"{flags.weights} {name}: rescales its images internally; use timm/{short}, which does not")


def load_pretrained(name: str, model: str, flags: Flags = TEACHER, model_args: str | None = None) -> Pretrained:
    """Fetch or open `name`; `model` is the network of a file of weights, `model_args` what its constructor is given.

    Raises: UserError if it cannot be fetched or read, or if its expectations are unknown.
    """
    library, _, short = name.partition("/")
    if is_of_library(name):
        check_pretrained(name, model, flags=flags)
        pretrained = {"torchvision": _from_torchvision, "timm": _from_timm}[library](name, short, flags)
        return pretrained._replace(flags=flags)
    path = expand_user(name, flags.weights)
    if path.is_dir():
        pretrained = _from_folder(path, model, flags)
        given = model_args if pretrained.model == model else None
        return pretrained._replace(flags=flags, model_args=given or pretrained.model_args)
    check_name(model)
    expected = read_expected(path, flags)
    weights = read_file(path)
    found = Pretrained(model, weights.tensors, *expected, weights.ordered, weights.notes)
    return found._replace(flags=flags, model_args=model_args)


def build_pretrained(pretrained: Pretrained, name: str) -> nn.Module:
    """The network with its weights and all of its own classes."""
    _require_classes(pretrained, name)
    network = _build(pretrained, len(pretrained.classes))
    load_into(network, pretrained, name)
    return network


def build_embedder(pretrained: Pretrained, name: str) -> nn.Module:
    """The network with its weights, without its classifier; the weights may have none, or one over any classes.

    Weights of timm's are resampled for the image size that `model_args` ask for.
    """
    arguments = parse_model_args(pretrained.model_args)
    network = _build(pretrained, 0)
    heads = classifier_layers(pretrained.model, pretrained.image_size, arguments)
    rows = len(pretrained.classes) or rows_of_head(_weights(pretrained))
    if rows is None or is_of_library(name) or fits(network, pretrained, heads):
        load_into(network, pretrained, name, heads, resample=True)
        return network
    whole = _build(pretrained, rows)  # weights under other names fit as a whole only
    load_into(whole, pretrained, name)
    return without_classifier(whole, pretrained.model, rows)


def at_size(pretrained: Pretrained, model_args: str | None) -> Pretrained:
    """A library's network built with these arguments of its constructor, for images of the size among them."""
    size = asked_size(pretrained.model, parse_model_args(model_args))
    return pretrained._replace(model_args=model_args, image_size=size or pretrained.image_size)


def _build(pretrained: Pretrained, classes: int, quiet: bool = False) -> nn.Module:
    arguments = parse_model_args(pretrained.model_args)
    return build_model(pretrained.model, classes, pretrained.image_size, quiet, arguments)


def _require_classes(pretrained: Pretrained, name: str) -> None:
    rows = rows_of_head(_weights(pretrained)) if pretrained.ordered else None
    outputs = f" of its {rows} outputs" if rows else ""
    key, file = "classes", Path(name).with_suffix(".json").name
    if not is_of_library(name) and expand_user(name, "--teacher").is_dir():
        key, file = "id2label" if pretrained.saved_by else "label_names", f"{name}/config.json"
    require(
        bool(pretrained.classes),
        f"{pretrained.flags.weights} {name}: its classes have no names to match with the data's; list those{outputs},"
        f' in order, as "{key}" in {file}; or {NEW_HEAD_ADVICE}',
    )


def load_into(
    network: nn.Module, pretrained: Pretrained, name: str, heads: tuple[str, ...] = (), resample: bool = False
) -> tuple[str, ...]:
    """Load the weights named `name` into a network, except into its layers `heads`; returns what to say of them.

    `resample`: adapt weights for images or patches of another size, if the network's library can. Raises: UserError if
    they do not fit, or are not finite.
    """
    state, weights = network.state_dict(), _weights(pretrained)
    shapes = _shapes(state, heads)
    asked, notes = f"{pretrained.flags.weights} {name}", ()
    try:
        fit = find_fit(weights, shapes)
        if fit is None and heads:  # the file may have no last layer, or quite another
            weights = weights._replace(tensors=_without(weights.tensors, heads))
            shapes = _without(shapes, heads)
            fit = find_fit(weights, shapes)
        if fit is None and resample and (changed := libraries.resampled(network, weights.tensors)):
            fit = find_fit(Weights(changed, ordered=False), shapes)
            if fit is not None:
                notes, weights = _resampling_notes(weights.tensors, changed), Weights(changed)
    except UserError as error:
        raise UserError(f"{asked}: {error}") from error
    if fit is None:
        raise UserError(_why_misfit(pretrained, weights, shapes, name))
    loaded = {ours: weights.tensors[theirs] for ours, theirs in fit.names.items()}
    loaded |= {key: value for key, value in state.items() if _inside(key, heads)}
    bad = not_finite(loaded)
    require(bad is None, f"{asked}: {bad} holds NaN or infinity; use intact weights")
    try:
        network.load_state_dict(loaded)
    except RuntimeError as error:
        reason = clip(str(error), 300)
        raise UserError(f"{asked}: torch does not load it ({reason}); use other weights") from error
    return fit.notes + notes


def fits(network: nn.Module, pretrained: Pretrained, heads: tuple[str, ...]) -> bool:
    """Whether the weights fit the network as they are, whatever its layers `heads`."""
    shapes = _shapes(network.state_dict(), heads)
    weights = _weights(pretrained)
    without = weights._replace(tensors=_without(weights.tensors, heads))
    return find_fit(weights, shapes) is not None or find_fit(without, _without(shapes, heads)) is not None


def _weights(pretrained: Pretrained) -> Weights:
    return Weights(pretrained.weights, pretrained.ordered)


def _resampling_notes(given: dict[str, Tensor], changed: dict[str, Tensor]) -> tuple[str, ...]:
    names = [key for key in changed if key in given and changed[key].shape != given[key].shape]
    return (f"resampled {', '.join(names[:3])} for images or patches of another size",) if names else ()


def _shapes(state: dict[str, Tensor], heads: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The network's shapes; the number of rows of the layers `heads` may be any."""
    shape = lambda key, value: (-1, *value.shape[1:]) if _inside(key, heads) else tuple(value.shape)  # noqa: E731
    return {key: shape(key, value) for key, value in state.items()}


def _without(named: dict, heads: tuple[str, ...]) -> dict:
    return {key: value for key, value in named.items() if not _inside(key, heads)}


def _inside(key: str, layers: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{layer}.") for layer in layers)


def _why_misfit(pretrained: Pretrained, weights: Weights, shapes: dict, name: str) -> str:
    rows, classes, flags = rows_of_head(weights), len(pretrained.classes), pretrained.flags
    if pretrained.saved_by:
        return (
            f"{flags.weights} {name}: is a {pretrained.saved_by} of Transformers, which does not fit the network"
            f" {pretrained.model} ({misfit(weights, shapes)}); give {flags.model} module:function, a function of your"
            f" own that takes num_classes and returns that model, or name the same network as {flags.weights} timm/NAME"
        )
    fitting = _networks_that_fit(weights, rows or classes, pretrained.image_size)
    if pretrained.model in fitting:
        remedy = f"its last layer has {rows} outputs, and {classes} classes are named for it; name all of them"
    elif fitting:
        remedy = f"they fit {' and '.join(fitting)}: give {flags.model} {fitting[0]}"
    elif pretrained.model == name:
        remedy = "fetch them again"
    else:
        remedy = f"name the right one with {flags.model}"
    found = misfit(weights, shapes)
    return f"{flags.weights} {name}: its weights do not fit the network {pretrained.model}: {found}; {remedy}"


def _networks_that_fit(weights: Weights, classes: int, image_size: tuple[int, int]) -> list[str]:
    """Those of MODELS that the weights fit, with as many classes as the file has."""
    found = []
    for name, build in MODELS.items():
        with torch.device("meta"):
            state = build(classes, image_size).state_dict()
        try:
            fits = find_fit(weights, _shapes(state, ())) is not None
        except UserError:  # several parts of the file fit
            fits = True
        if fits:
            found.append(name)
    return found[:3]


def origin_of(pretrained: Pretrained, name: str) -> Origin:
    return Origin(name, pretrained.sha256, pretrained.image_size, pretrained.mean, pretrained.std)


def _from_torchvision(name: str, short: str, flags: Flags) -> Pretrained:
    import torchvision

    weights = torchvision.models.get_model_weights(short).DEFAULT
    transforms = weights.transforms()
    try:
        tensors = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise UserError(_unreachable(f"{flags.weights} {name}", error, f"save {weights.url} as {place}")) from error
    # DenseNets' files have the layer names that torchvision used before 2018.
    tensors = {re.sub(r"(layer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key): value for key, value in tensors.items()}
    classes, size = tuple(weights.meta["categories"]), (transforms.crop_size[0],) * 2
    return Pretrained(name, tensors, classes, size, tuple(transforms.mean), tuple(transforms.std), ordered=False)


def _from_timm(name: str, short: str, flags: Flags) -> Pretrained:
    timm = libraries.timm_library()
    try:
        network = timm.create_model(short, pretrained=True)
    except Exception as error:  # of the Hub's client, a missing file, a network without pretrained weights
        raise UserError(_unreachable(f"{flags.weights} {name}", error, "name one of timm.list_pretrained()")) from error
    config = timm.data.resolve_model_data_config(network)
    subset, classes = timm.data.infer_imagenet_subset(network), network.pretrained_cfg.get("label_names") or ()
    if not classes and subset:
        classes = timm.data.ImageNetInfo(subset).label_descriptions()
    size = tuple(config["input_size"][1:])
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Pretrained(name, network.state_dict(), tuple(classes), size, mean, std, ordered=False)


def _unreachable(asked: str, error: Exception, remedy: str) -> str:
    reason = one_line(error, 150)
    return (
        f"{asked}: cannot fetch its pretrained weights ({reason}); check the network, {remedy}, or name a file of"
        f" weights ({asked.partition(' ')[0]} FILE)"
    )


def read_expected(path: Path, flags: Flags = TEACHER) -> Expected:
    """Read FILE.json beside a file of weights. Raises UserError if it is missing, malformed or of another scale."""
    require(path.is_file(), f"{flags.weights} {path}: no such file")
    beside = path.with_suffix(".json")
    require(
        beside.is_file(),
        f"{flags.weights} {path}: weights do not say which image size and normalisation they expect, nor the names of"
        f" their classes in order; write {beside}: {EXPECTED_JSON}",
    )
    info = read_json(beside)
    require("model" not in info, f"{beside}: belongs to a run; name the run's folder, {flags.weights} {path.parent}")
    size, mean, std, classes = (info.get(key) for key in ("image_size", "mean", "std", "classes"))
    valid = {
        "image_size": is_list(size, lambda side: type(side) is int and side > 0, 2),
        "mean": is_list(mean, is_number, 3),
        "std": is_list(std, is_number, 3),
        "classes": "classes" not in info or is_list(classes, lambda name: isinstance(name, str)),
    }
    wrong = [key for key, fine in valid.items() if not fine]
    require(not wrong, f"{beside}: {', '.join(wrong)} incomplete or malformed; write {EXPECTED_JSON}")
    in_range = all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)
    require(in_range, f"{beside}: mean and std must be from 0 to 1, as shares of 255; write {EXPECTED_JSON}")
    return Expected(tuple(classes or ()), tuple(size), tuple(map(float, mean)), tuple(map(float, std)))


def is_transformers_folder(path: Path) -> bool:
    """Whether Transformers or timm saved a network in this folder."""
    try:
        config = read_json(path / "config.json")
    except UserError:
        return False
    return "architectures" in config or "architecture" in config


def _from_folder(path: Path, model: str, flags: Flags) -> Pretrained:
    """A network that timm saved, or one of Transformers whose weights are for the network `model`."""
    config, weights = read_json(path / "config.json"), read_folder(path)
    labels = config.get("id2label") or config.get("label_names") or ()
    classes = tuple(labels[key] for key in sorted(labels, key=int)) if isinstance(labels, dict) else tuple(labels)
    classes = tuple(map(str, classes))
    if isinstance(config.get("architecture"), str):
        model, saved_by = f"timm/{config['architecture']}", ""
        arguments, expected = _arguments_of_timm(path, config), _of_timm(path, config)
        classes = classes or _imagenet_classes(config)
    else:
        saved_by, arguments = ", ".join(map(str, config["architectures"] or ("network",))), None
        expected = _of_preprocessor(path / "preprocessor_config.json", saved_by, flags)
    check_name(model)
    return Pretrained(model, weights.tensors, classes, *expected, weights.ordered, weights.notes, saved_by, arguments)


def _arguments_of_timm(path: Path, config: dict) -> str | None:
    """The arguments that timm built the network with, as --teacher-model-args has them; None without any.

    Leaves out classes, image size, and a pooling equal to the architecture's default. Raises UserError for what is no
    such argument.
    """
    asked = f"{path / 'config.json'}: model_args"
    given = config.get("model_args") or {}
    require(isinstance(given, dict), f"{asked} {given!r} is no object; download the folder again")
    kept = {key: value for key, value in given.items() if key not in ("num_classes", "in_chans", "img_size")}
    pool = kept.get("global_pool")
    if pool is not None and pool == libraries.pool_of_timm(config["architecture"]):  # timm writes it of every network
        del kept["global_pool"]
    text = format_model_args({key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()})
    parse_model_args(text, asked)
    return text or None


def _imagenet_classes(config: dict) -> tuple[str, ...]:
    timm = libraries.timm_library()
    subset = timm.data.infer_imagenet_subset({**config["pretrained_cfg"], "num_classes": config.get("num_classes")})
    return tuple(timm.data.ImageNetInfo(subset).label_descriptions()) if subset else ()


def _of_timm(path: Path, config: dict) -> tuple:
    try:
        settings, built = config["pretrained_cfg"], (config.get("model_args") or {}).get("img_size")
        size, mean, std = (settings[key] for key in ("input_size", "mean", "std"))
        if built is not None:  # older versions of timm left the size of the first training in its settings
            size = built if isinstance(built, list) else [built, built]
        return _image_settings(size[-2:], mean, std)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'config.json'}: its pretrained_cfg has no input_size, mean and std; download the folder again"
        ) from error


def _of_preprocessor(path: Path, saved_by: str, flags: Flags) -> tuple:
    """Image size, mean and std in a preprocessor_config.json."""
    example = '{"size": {"height": 224, "width": 224}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    require(
        path.is_file(),
        f"{flags.weights} {path.parent}: is a {saved_by} of Transformers, and says not which image size and"
        f" normalisation it expects; write {path}: {example}",
    )
    settings = read_json(path)
    _check_prepared(settings, path, flags)
    try:
        size = settings.get("crop_size") if settings.get("do_center_crop") else None
        size = size or settings["size"]
        if isinstance(size, dict):
            side = size.get("shortest_edge")
            size = [size.get("height", side), size.get("width", side)]
        else:
            size = size if isinstance(size, list) else [size, size]
        return _image_settings(size, settings["image_mean"], settings["image_std"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: incomplete or malformed; write {example}") from error


def _check_prepared(settings: dict, path: Path, flags: Flags) -> None:
    """Raise UserError if a preprocessor_config.json asks for what kd does not do to images."""
    factor = settings.get("rescale_factor")
    scaled = factor is None or (is_number(factor) and abs(factor / PIXEL - 1) < 1e-3)
    wanted = {key: right for key, right in PREPARED.items() if settings.get(key) not in (right, None)}
    wanted |= {} if scaled else {"rescale_factor": PIXEL}
    key, right = next(iter(wanted.items()), ("", None))
    require(
        not wanted,
        f"{path}: {key} is {json.dumps(settings.get(key))}, and kd gives every network RGB pixels / 255, less"
        f" image_mean, divided by image_std; give {flags.model} module:function, a network that changes these to what"
        f" it needs, and write {json.dumps(right)} there",
    )


def _image_settings(size: list, mean: list, std: list) -> tuple:
    """Raises ValueError if they are no size and normalisation."""
    size, mean, std = tuple(map(int, size)), tuple(map(float, mean)), tuple(map(float, std))
    if len(size) != 2 or min(size) <= 0 or len(mean) != 3 or len(std) != 3 or not all(0 < value <= 1 for value in std):
        raise ValueError
    return size, mean, std
