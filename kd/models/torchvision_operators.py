"""Makes torchvision importable where its compiled operators do not fit the torch that is there.

The package index's torchvision carries operators compiled for the CUDA build of torch. Beside a CPU-only torch of the
same version they do not load, and `import torchvision` fails with "operator torchvision::nms does not exist".
No classifier uses these operators; declaring the two that are looked up at import is enough.
"""

import importlib.machinery
import importlib.util
import sys

import torch

_libraries = []  # a library's definitions live as long as the object


def define() -> None:
    """Declare the missing operators; does nothing where torchvision brought its own or is imported already."""
    if "torchvision" in sys.modules or _operators_load():
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def _operators_load() -> bool:
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return False
    compiled = importlib.machinery.PathFinder.find_spec("torchvision._C", package.submodule_search_locations)
    if compiled is None or compiled.origin is None:
        return False
    try:
        torch.ops.load_library(compiled.origin)
    except OSError:
        return False
    return True
