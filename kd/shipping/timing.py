"""Times of several things that are compared with one another."""

import statistics
import time
from collections.abc import Callable, Mapping

ROUNDS, PATIENCE = (5, 100), 30.0  # at least and at most; seconds


def interleaved(pieces: Mapping[str, Callable[[], object]], patience: float = PATIENCE) -> dict[str, float]:
    """Median seconds of each piece, the pieces taking turns: what disturbs the machine disturbs all alike.

    The first round warms up and is not counted. After `patience` seconds no more than the least rounds are made.
    """
    times, started = {name: [] for name in pieces}, time.perf_counter()
    for round_ in range(ROUNDS[1] + 1):
        if round_ > ROUNDS[0] and time.perf_counter() - started > patience:
            break
        for name, piece in pieces.items():
            before = time.perf_counter()
            piece()
            if round_ > 0:
                times[name].append(time.perf_counter() - before)
    return {name: statistics.median(taken) for name, taken in times.items()}
