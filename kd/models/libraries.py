"""Networks of torchvision and timm, told how large the images are where a network's shape depends on it.

Both build transformers for 224 pixels unless told otherwise, in patches that may be larger than a small image.
timm is an optional dependency; either is imported only when one of its networks is named.
"""

import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from kd.errors import UserError


@contextmanager
def taking_images(name: str, image_size: tuple[int, int]) -> Iterator[None]:
    """What a network answers to images that it cannot take becomes a UserError with its name and their size."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        height, width = image_size
        raise UserError(f"model {name}: cannot take images of {width} x {height} pixels ({error})") from error


def torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def from_torchvision(name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    import torchvision

    extra = {}
    if name in ("googlenet", "inception_v3"):
        extra = {"aux_logits": False, "init_weights": True}  # or they return training heads beside the logits
    elif name.startswith("maxvit_"):
        extra = {"input_size": image_size}
    elif name.startswith("vit_"):
        patch, side = int(name.rpartition("_")[2]), image_size[0]
        recipe = f"torchvision.models.VisionTransformer(image_size={side}, patch_size={_patch_for(image_size)}, ...)"
        _check_patches((patch, patch), image_size, recipe)
        if image_size != (side, side):
            raise ValueError("it takes square ones only; timm/vit_... takes any")
        extra = {"image_size": side}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)


def timm_names() -> list[str]:
    """Plain names, and those with the tag of their pretrained weights."""
    timm = timm_library()
    return [*timm.list_models(), *timm.list_pretrained()]


def from_timm(name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    timm = timm_library()
    # Only these constructors take the size; the others would refuse the argument.
    extra = {"img_size": image_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    network = timm.create_model(name, pretrained=False, num_classes=num_classes, **extra)
    embeddings = (module for module in network.modules() if isinstance(module, timm.layers.PatchEmbed))
    first = next(embeddings, None)  # the one that reads the image
    if extra and first is not None:
        # timm itself would silently cut off what no whole patch covers.
        recipe = f"timm.create_model({name!r}, img_size={image_size}, patch_size={_patch_for(image_size)}, ...)"
        _check_patches(first.patch_size, image_size, recipe)
    return network


def timm_library():
    try:
        import timm
    except ImportError as error:
        raise UserError("timm/NAME needs timm: pip install timm") from error
    return timm


def _check_patches(patch: tuple[int, int], image_size: tuple[int, int], recipe: str) -> None:
    if image_size[0] % patch[0] or image_size[1] % patch[1]:
        raise ValueError(
            f"its patches of {patch[1]} x {patch[0]} do not divide them; name a network of smaller patches,"
            f" or a module:function of your own that returns {recipe}"
        )


def _patch_for(image_size: tuple[int, int]) -> int:
    """The customary 4 x 4 patch of small images, or less where 4 does not divide them."""
    return math.gcd(*image_size, 4)


#: (kd.models.torchvision_operators) Makes torchvision importable where its compiled operators do not fit the torch that is there.
#:
#: The package index's torchvision carries operators compiled for the CUDA build of torch. Beside a CPU-only torch of the
#: same version they do not load, and `import torchvision` fails with "operator torchvision::nms does not exist".
#: No classifier uses these operators; declaring the two that are looked up at import is enough.


SUFFIXES = {".so", ".pyd", ".dll", ".dylib"}


_libraries = []  # a library's definitions live as long as the object


def define() -> None:
    """Declare the missing operators; does nothing where torchvision brought its own, or after the first time."""
    if _libraries or "torchvision" in sys.modules or _operators_load():
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def _operators_load() -> bool:
    """Whether a library of torchvision's own loads; it then stays loaded, and its import finds it there."""
    package = importlib.util.find_spec("torchvision")
    folders = package.submodule_search_locations or () if package else ()
    # _C.so once, _C_stable.so since torchvision 0.29
    libraries = [path for folder in folders for path in sorted(Path(folder).glob("_C*")) if path.suffix in SUFFIXES]
    return any(_loads(path) for path in libraries)


def _loads(path: Path) -> bool:
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError):
        return False
    return True
