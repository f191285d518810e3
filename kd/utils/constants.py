"""Small tensors that are the same for every batch, made once for each device and setting."""

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor


def made_once(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make`, whose results are kept: making one in every step costs a launch, and copying one makes the host wait.

    The compiler would warn of a cache; it makes such a tensor within its own kernels.
    """
    cached = cache(make)

    @wraps(make)
    def get(*args) -> Tensor:
        return make(*args) if torch.compiler.is_compiling() else cached(*args)

    return get
