"""Losses over a whole batch see the global one, however many processes share it."""

import torch
import torch.distributed as distributed
from torch import Tensor


class _Gather(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather does this too, and warns that it will go.
    @staticmethod
    def forward(ctx, share: Tensor) -> Tensor:
        parts = [torch.empty_like(share) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, share)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # The sum over processes, each of which computed the loss of the whole batch. Data parallelism then averages
        # parameters' gradients over processes, and what is left is the gradient of that one loss.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


@torch.compiler.disable  # the compiler would rewrite the collectives; called as they are they cost one graph break
def global_batch(share: Tensor) -> Tensor:
    """All processes' equal shares of a batch, in order, with gradients to each; alone, the tensor itself."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return share
    return _Gather.apply(share.contiguous())
