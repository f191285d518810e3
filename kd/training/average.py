"""A running mean of the weights (--ema), beside the weights that are trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

SHARE = 10  # an average over this part of the run is long enough to smooth and forgets the first weights


class Average:
    """The exponential moving average of a network's weights, updated after every step.

    After the first step it is the weights; then decay * average + (1 - decay) * weights (Polyak and Juditsky, 1992;
    as torch's AveragedModel with use_buffers). BatchNorm's running statistics are averaged like the weights, so that
    they belong to them: the last step's would be those of other activations. Tensors of integers, such as a table of
    indices, are copied.

    Not an AveragedModel itself: that one makes the host wait for the device at every step, truncates averaged integers,
    and holds a copy of the network, with a user's own hooks in it.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = network
        self.weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (from 0)."""
        now = self.network.state_dict()
        averaged = [] if step == 0 else [name for name, tensor in now.items() if tensor.is_floating_point()]
        chosen = set(averaged)
        if copied := [name for name in now if name not in chosen]:  # at once: a launch, not one for each counter
            torch._foreach_copy_([self.weights[name] for name in copied], [now[name] for name in copied])
        if averaged:
            self._average([self.weights[name] for name in averaged], [now[name] for name in averaged], step)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's average. Raises KeyError or RuntimeError if it does not fit the network."""
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])


def too_long(decay: float | None, steps: int) -> str | None:
    """A warning if the average reaches back over more than a quarter of the run: early weights then count in it."""
    if decay is None or 4 / (1 - decay) <= steps:
        return None
    span, better = round(1 / (1 - decay)), 1 - SHARE / max(steps, 2 * SHARE)
    return f"--ema {decay:g}: averages over about {span} steps, and the run has {steps}; {better:.4g} suits it better"


@contextmanager
def weights_in(network: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Put other weights into the network inside the block."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(weights)
    try:
        yield
    finally:
        network.load_state_dict(before)
