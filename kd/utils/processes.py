import time
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from kd.utils.system import Lock


@contextmanager
def same_threads():
    """Give the thread count back that a resumed run may have changed to its own."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def wait_for(lock: Lock | None, message: str, accelerator: Accelerator) -> None:
    """Return on all processes once the main process has its lock; the others pass None.

    In short waits: a collective must not time out while somebody else's long work goes on.
    """
    said = False
    while True:
        mine = torch.tensor(float(lock.acquire()) if lock else 0.0, device=accelerator.device)
        if accelerator.reduce(mine, "sum").item() > 0:
            return
        if accelerator.is_main_process and not said:
            print(message, flush=True)
        said = True
        time.sleep(1)


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process rank 0's BatchNorm statistics, which under data parallelism differ between processes."""
    if torch.distributed.is_initialized():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
