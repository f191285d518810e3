"""Times of several things that are compared with one another."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

ROUNDS, PATIENCE = (5, 100), 30.0  # at least and at most; seconds


def time_interleaved(pieces: Mapping[str, Callable[[], object]], patience: float = PATIENCE) -> dict[str, float]:
    """Median seconds of each piece, the pieces taking turns: what disturbs the machine disturbs all alike."""
    return {name: statistics.median(taken) for name, taken in time_rounds(pieces, ROUNDS, patience).items()}


def time_rounds(
    pieces: Mapping[str, Callable[[], object]], rounds: tuple[int, int], patience: float = PATIENCE
) -> dict[str, list[float]]:
    """Seconds of each piece in each round, the pieces taking turns.

    The first round warms up and is not counted. `rounds`: at least and at most; after `patience` seconds the least.
    """
    times, started = {name: [] for name in pieces}, time.perf_counter()
    for round_ in range(rounds[1] + 1):
        if round_ > rounds[0] and time.perf_counter() - started > patience:
            break
        for name, piece in pieces.items():
            before = time.perf_counter()
            piece()
            if round_ > 0:
                times[name].append(time.perf_counter() - before)
    return times


THREADS = 1  # of one image there is little to share out, and one thread's time is the steadier


@torch.no_grad()
def count_macs(network: nn.Module, image_size: tuple[int, int]) -> int:
    """Multiply-accumulates of the network's convolutions and matrix products for one image; it is left as it was."""
    from torch.utils.flop_counter import FlopCounterMode

    training, device = network.training, next(network.parameters()).device
    network.eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *image_size, device=device))
    network.train(training)
    return counter.get_total_flops() // 2  # the library counts a multiply-accumulate as two


def describe_machine(threads: int = THREADS) -> str:
    """The CPU's name as far as the system tells it, and the threads used: what a latency belongs to."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
