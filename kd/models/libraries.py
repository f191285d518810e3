"""Networks of torchvision and timm.

By default both build transformers for images of 224 pixels, in patches that may be larger than a small image, so they
are given the image size. timm is an optional dependency. Either is imported only when one of its networks is named.
"""

import functools
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kd.errors import UserError, is_users_own, require
from kd.utils.console import clip
from kd.utils.users_own import is_module_function

# Arguments that kd itself gives, or that would fetch or open other weights than those that a flag names. The arguments
# may come from a stranger's model.json.
# fmt: off
RESERVED = (
    "num_classes", "in_chans", "weights", "weights_backbone", "progress", "pretrained", "checkpoint_path",
    "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "pretrained_strict",
    "pretrained_filter_fn", "features_only", "feature_cfg", "out_indices", "kwargs_filter", "model_cfg",
    "model_cls", "variant", "pruned", "scriptable", "exportable", "no_jit", "device", "dtype", "aux_logits",
    "init_weights",
)
# fmt: on


def torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def from_torchvision(
    name: str, num_classes: int, image_size: tuple[int, int], arguments: Mapping[str, object]
) -> nn.Module:
    import torchvision

    options = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # aux_logits: else they return several logits in training
    elif name.startswith("maxvit_"):
        options = {"input_size": image_size}
    elif name.startswith("vit_"):
        patch, side = int(name.rpartition("_")[2]), image_size[0]
        remedy = f"torchvision.models.VisionTransformer(image_size={side}, patch_size={_patch_for(image_size)}, ...)"
        _check_patches((patch, patch), image_size, remedy)
        if image_size != (side, side):
            raise ValueError("it takes square images only; timm/vit_... takes any")
        options = {"image_size": side}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **{**options, **arguments})


def timm_names() -> list[str]:
    """Names of architectures, and of architectures with the tag of their pretrained weights."""
    timm = timm_library()
    return [*timm.list_models(), *timm.list_pretrained()]


def from_timm(name: str, num_classes: int, image_size: tuple[int, int], arguments: Mapping[str, object]) -> nn.Module:
    timm = timm_library()
    # Only constructors with a fixed input size accept img_size; timm would silently leave it out for the others.
    options = {"img_size": image_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    require(
        bool(options) or "img_size" not in arguments,
        f"--model-args img_size: timm/{name} takes images of any size; leave it out, and give --image-size",
    )
    network = timm.create_model(name, pretrained=False, num_classes=num_classes, **{**options, **arguments})
    embeddings = (module for module in network.modules() if isinstance(module, timm.layers.PatchEmbed))
    first = next(embeddings, None)  # the one that reads the image
    if options and first is not None:
        # timm would silently drop pixels outside whole patches.
        remedy = f"timm.create_model({name!r}, img_size={image_size}, patch_size={_patch_for(image_size)}, ...)"
        _check_patches(first.patch_size, image_size, remedy)
    return network


@functools.cache
def pool_of_timm(name: str) -> str | None:
    """How an architecture of timm's pools its last map if nothing else is asked for; None if that is not known."""
    try:
        with torch.random.fork_rng(devices=[]):
            network = timm_library().create_model(name)
    except Exception:  # each network of timm's fails in its own way
        return None
    pools = (getattr(part, "global_pool", None) for part in (network, getattr(network, "head", None)))
    names = (pool if isinstance(pool, str) else getattr(pool, "pool_type", None) for pool in pools)
    return next((pool for pool in names if pool is not None), None)


def timm_library():
    try:
        import timm
    except ImportError as error:
        raise UserError("timm/NAME needs timm: pip install timm") from error
    return timm


def checkpoint_gradients(network: nn.Module, name: str) -> None:
    """Make the network compute its blocks' activations again in the backward pass, as timm's networks can.

    BatchNorm inside these blocks sees each batch twice. Raises UserError if the network does not offer it.
    """
    setter = getattr(network, "set_grad_checkpointing", None)  # timm's name for it
    require(
        setter is not None,
        f"--gradient-checkpointing: {name} does not offer it; take a timm/NAME network, or save memory by --accumulate",
    )
    try:
        setter(True)
    except (AssertionError, NotImplementedError) as error:  # a few of timm's refuse
        raise UserError(f"--gradient-checkpointing: {name} does not offer it ({clip(str(error))})") from error


def resampled(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Weights of the same network for images or patches of another size, as the network's library resamples them.

    None if the library has no such function, or it fails.
    """
    module = sys.modules[type(network).__module__]
    try:
        if module.__name__.startswith("timm.models."):
            return dict(module.checkpoint_filter_fn(dict(tensors), network))
        if module.__name__ == "torchvision.models.vision_transformer":
            return dict(module.interpolate_embeddings(network.image_size, network.patch_size, OrderedDict(tensors)))
    except Exception:  # weights of another network: the caller says in what they differ
        return None
    return None


@contextmanager
def argument_errors(name: str, arguments: Mapping[str, object]) -> Iterator[None]:
    """Check --model-args of network `name`, and turn the constructor's errors over them into a UserError."""
    reserved = ("num_classes",) if is_module_function(name) else RESERVED
    for key in arguments:
        require(key not in reserved, f"--model-args {key}: is not for you to give to {name}; leave it out")
    try:
        yield
    except Exception as error:
        if not arguments or is_users_own(error):
            raise
        text = str(error.__cause__ or error)
        wrong = re.search(r"(?:unexpected keyword argument|multiple values for (?:keyword )?argument) '(\w+)'", text)
        if wrong and wrong[1] in arguments:
            raise UserError(f"--model-args {wrong[1]}: {name} takes no such argument ({clip(text, 200)})") from error
        given = ",".join(f"{key}={value!r}" for key, value in arguments.items())
        if isinstance(error, UserError):
            raise (UserError(f"{error}; built with --model-args {given}") if error.__cause__ else error) from error
        raise UserError(f"--model-args {given}: {name} cannot be built with them ({clip(text, 300)})") from error


@contextmanager
def image_errors(name: str, image_size: tuple[int, int]) -> Iterator[None]:
    """Turn an error of network `name` on images of this size into a UserError that names both.

    An error in code of the user's own passes, with a note that names both: its traceback says more.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        height, width = image_size
        if is_users_own(error):
            error.add_note(f"model {name} was given images of {width} x {height} pixels")
            raise
        if not isinstance(error, RuntimeError | ValueError | AssertionError | TypeError):
            raise
        raise UserError(
            f"model {name}: cannot take images of {width} x {height} pixels ({clip(str(error), 300)})"
        ) from error


def _check_patches(patch: tuple[int, int], image_size: tuple[int, int], remedy: str) -> None:
    if image_size[0] % patch[0] or image_size[1] % patch[1]:
        raise ValueError(
            f"its patches of {patch[1]} x {patch[0]} do not divide them; name a network with smaller patches,"
            f" or a module:function of your own that returns {remedy}"
        )


def _patch_for(image_size: tuple[int, int]) -> int:
    """The usual 4 x 4 patch of small images, or a smaller one if 4 does not divide them."""
    return math.gcd(*image_size, 4)
