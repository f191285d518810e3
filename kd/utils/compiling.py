"""What torch.compile is asked for, where a launch compiles: the flags of kd/training/launch.py, kept by Accelerate."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend


def compiles(accelerator: Accelerator) -> bool:
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def compiled(function: Callable, accelerator: Accelerator, mode: str | None = None) -> Callable:
    """A module or function compiled as the launch says, in another `mode` if given; itself where nothing is compiled.

    The compiler runs at the first call, and again for each new shape.
    """
    if not compiles(accelerator):
        return function
    options = accelerator.state.dynamo_plugin.to_kwargs()
    return torch.compile(function, **options | ({"mode": mode} if mode else {}))


def uses_graphs(accelerator: Accelerator) -> bool:
    """Whether compiled functions are replayed as CUDA graphs.

    A graph's next replay overwrites its results. torch.compiler.cudagraph_mark_step_begin says when that may happen.
    """
    return compiles(accelerator) and accelerator.state.dynamo_plugin.mode in ("reduce-overhead", "max-autotune")
