"""The operators that torchvision needs to be importable.

The package index's torchvision ships operators compiled for the CUDA build of torch. Beside a CPU-only torch of the
same version they do not load, and `import torchvision` fails with "operator torchvision::nms does not exist". Neither
classifiers nor augmentation use these operators, so declaring the two that the import looks up is enough.
"""

import importlib.util
import sys
from pathlib import Path

import torch

SHARED_LIBRARIES = {".so", ".pyd", ".dll", ".dylib"}

_declared = []  # torch forgets a Library's definitions when the object is deleted


def define_operators() -> None:
    """Declare torchvision's operators if its own do not load. Call it before anything imports torchvision.

    Does nothing the second time, or if torchvision is already imported.
    """
    if _declared or "torchvision" in sys.modules or _operators_load():
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


def _operators_load() -> bool:
    """Whether torchvision's own operators load. They then stay loaded, and torchvision's import finds them."""
    package = importlib.util.find_spec("torchvision")
    folders = package.submodule_search_locations or () if package else ()
    files = [path for folder in folders for path in sorted(Path(folder).glob("_C*"))]  # _C_stable.so since 0.29
    return any(_loads(path) for path in files if path.suffix in SHARED_LIBRARIES)


def _loads(path: Path) -> bool:
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError):
        return False
    return True
