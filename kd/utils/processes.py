"""What the processes of one run do together, and their thread counts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from kd.utils.system import Lock


@contextmanager
def same_threads() -> Iterator[None]:
    """Restore torch's thread count at the end; a resumed run, for one, sets that of its first start."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def wait_for(lock: Lock | None, message: str, accelerator: Accelerator) -> None:
    """Return on all processes once the main process has acquired its lock; the others pass None.

    Polls every second: a collective that waited for another run's long work would time out.
    """
    announced = False
    while True:
        acquired = torch.tensor(float(lock.acquire()) if lock else 0.0, device=accelerator.device)
        if accelerator.reduce(acquired, "sum").item() > 0:
            return
        if accelerator.is_main_process and not announced:
            print(message, flush=True)
        announced = True
        time.sleep(1)


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's BatchNorm statistics to every process; under data parallelism they differ."""
    if torch.distributed.is_initialized():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
