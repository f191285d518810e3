"""Makes torchvision importable where its compiled operators do not fit the torch that is there.

The package index's torchvision carries operators compiled for the CUDA build of torch. Beside a CPU-only torch of the
same version they do not load, and `import torchvision` fails with "operator torchvision::nms does not exist".
No classifier uses these operators; declaring the two that are looked up at import is enough.
"""

import importlib.util
import sys
from pathlib import Path

import torch

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
