"""What a network costs to run: multiply-accumulates, and times measured in turns."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from kd.utils.system import cpu_name

MIN_ROUNDS, MAX_ROUNDS = 5, 100
PATIENCE = 30.0  # seconds, after which MIN_ROUNDS are enough
THREADS = 1  # one image is too little work to share, and times on one thread vary less


def count_params(network: nn.Module) -> int:
    """Numbers that training can set; a shared one counts once."""
    return sum(parameter.numel() for parameter in network.parameters())


@contextmanager
def unfused_attention() -> Iterator[None]:
    """A block in which attention runs as plain matrix products: PyTorch's counter misses those that are fused."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@torch.no_grad()
def count_macs(network: nn.Module, image_size: tuple[int, int]) -> int:
    """Multiply-accumulates in the network's convolutions and matrix products for one image."""
    from torch.utils.flop_counter import FlopCounterMode

    training, device = network.training, next(network.parameters()).device
    network.eval()
    with unfused_attention(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *image_size, device=device))
    network.train(training)
    return counter.get_total_flops() // 2  # the counter takes a multiply-accumulate for two operations


def time_interleaved(workloads: Mapping[str, Callable[[], object]], patience: float = PATIENCE) -> dict[str, float]:
    """Median seconds of each workload. They take turns, so that a disturbance of the machine affects all alike."""
    rounds = time_rounds(workloads, (MIN_ROUNDS, MAX_ROUNDS), patience)
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}


def time_rounds(
    workloads: Mapping[str, Callable[[], object]], rounds: tuple[int, int], patience: float = PATIENCE
) -> dict[str, list[float]]:
    """Seconds of each workload in each round, the workloads taking turns.

    The first round warms up and is not counted. `rounds`: the fewest, enough after `patience` seconds, and the most.
    """
    times, started = {name: [] for name in workloads}, time.perf_counter()
    for round_ in range(rounds[1] + 1):
        if round_ > rounds[0] and time.perf_counter() - started > patience:
            break
        for name, workload in workloads.items():
            before = time.perf_counter()
            workload()
            if round_ > 0:
                times[name].append(time.perf_counter() - before)
    return times


def describe_machine(threads: int = THREADS) -> str:
    """What a latency was measured on: CPU, threads and torch version."""
    return f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
