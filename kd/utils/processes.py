"""What the processes of one run do together, on one machine or several, and their thread counts.

Machines (nodes) need not share a disk: what only the main process can read reaches the others by `from_main`. Work of
minutes is waited for through the key-value store by which the processes found each other (`all_do`); a collective of
NCCL would time out. All processes call these functions together, in the same order.
"""

import itertools
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

import torch
from accelerate import PartialState
from torch import distributed, nn

from kd.errors import TOLD, OtherProcessError, UserError
from kd.utils.system import Lock

T = TypeVar("T")

LONGEST = 7 * 24 * 3600.0  # seconds of one process's work, such as waiting for another run, that the others wait for
SHORTEST_POLL, LONGEST_POLL = 0.001, 0.2  # seconds between two looks at the store; waits that last are polled less
LEAVING = 60.0  # seconds for which the main process, which may serve the store, stays for the others to look at it
FAILING = 5.0  # the same after an error
FAILED = "kd/failed"  # key of the error by which a process ended, outside of all meetings
CHUNK = 2**26  # bytes that are sent at once: what it takes of a GPU's memory

_meetings = itertools.count()  # numbers of `all_do`, the same on every process


@contextmanager
def same_threads() -> Iterator[None]:
    """Restore torch's thread count at the end; a resumed run, for one, sets that of its first start."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def wait_for(lock: Lock, message: str) -> None:
    """Return once this process has acquired the lock; prints `message` if another process has it."""
    announced = False
    while not lock.acquire():
        if not announced:
            print(message, flush=True)
        announced = True
        time.sleep(1)


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's BatchNorm statistics to every process; under data parallelism they differ."""
    if distributed.is_initialized():
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)


def is_alone() -> bool:
    """Whether the run has one process."""
    return not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1


def is_main() -> bool:
    return is_alone() or distributed.get_rank() == 0


def is_first_on_node() -> bool:
    return is_alone() or os.environ.get("LOCAL_RANK", "0") == "0"


def node() -> str:
    """A name of this machine among those of the run."""
    return f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '0')}"


def nothing() -> None:
    """The work of a process that has none, for `all_do`."""


def all_do(work: Callable[[], T]) -> T:
    """`work()` on each process; returns once all are done, however long one takes.

    Raises: what `work` raises; on the other processes then OtherProcessError with its message, and also if a process
    ends by an error elsewhere and never comes here.
    """
    return work() if is_alone() else _Meeting().hold(work)


def from_main(read: Callable[[], T]) -> T:
    """`read()` of the main process, on every process. It must not call anything that processes do together.

    Raises as `all_do` does.
    """
    if is_alone():
        return read()
    value = all_do(read if is_main() else nothing)
    return _broadcast(value)


def anyone(flag: bool) -> bool:
    """Whether `flag` holds on any process. A collective: not for what some reach minutes later."""
    if is_alone():
        return flag
    found = torch.tensor(float(flag), device=PartialState().device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found)


def node_first(work: Callable[[bool], T]) -> T:
    """`work(True)` on each node's first process, then `work(False)` on the others: for what a node's disk keeps.

    Raises as `all_do` does.
    """
    if is_alone():
        return work(True)
    first = is_first_on_node()
    results = all_do((lambda: work(True)) if first else nothing), all_do(nothing if first else (lambda: work(False)))
    return results[not first]


def tell_others(error: BaseException) -> None:
    """Let the processes that wait for this one, which ends by an error, end too: no launcher may see both machines."""
    if not is_alone() and not isinstance(error, OtherProcessError):
        with suppress(RuntimeError):  # the store is gone: so are the others
            distributed.distributed_c10d._get_default_store().set(FAILED, _told(error))


TOLD.append(tell_others)


class _Meeting:
    """One `all_do`: its keys in the store."""

    def __init__(self):
        self.key = f"kd/{next(_meetings)}"
        self.store = distributed.distributed_c10d._get_default_store()

    def hold(self, work: Callable[[], T]) -> T:
        try:
            result = work()
        except BaseException as error:
            with suppress(RuntimeError):  # the store is gone: so are the others
                self.store.set(f"{self.key}/error", _told(error))
                self._leave(FAILING)
            raise
        try:
            self.store.add(f"{self.key}/done", 1)
            self._wait()
            self._leave(LEAVING)
        except RuntimeError as error:
            raise OtherProcessError("another process of the run has ended; its own message says why") from error
        return result

    def _wait(self) -> None:
        for _ in _poll(LONGEST):
            if self.store.add(f"{self.key}/done", 0) == distributed.get_world_size():
                return
            for key in (f"{self.key}/error", FAILED):
                if self.store.check([key]):
                    self._fail(*pickle.loads(self.store.get(key)))
        raise UserError(f"another process was not done after {LONGEST / 3600:.0f} hours; start the run again")

    def _fail(self, rank: int, where: str, text: str) -> NoReturn:
        with suppress(RuntimeError):
            self._leave(FAILING)
        raise OtherProcessError(f"process {rank}: {text}", shown=where != node() and is_first_on_node())

    def _leave(self, patience: float) -> None:
        """Tell that this process needs the store no more; the main process, which may serve it, goes last."""
        self.store.add(f"{self.key}/left", 1)
        if is_main():
            for _ in _poll(patience):
                if self.store.add(f"{self.key}/left", 0) == distributed.get_world_size():
                    return


def _poll(patience: float) -> Iterator[None]:
    start, pause = time.monotonic(), SHORTEST_POLL
    while time.monotonic() - start < patience:
        yield
        time.sleep(pause)
        pause = min(1.3 * pause, LONGEST_POLL)


def _told(error: BaseException) -> bytes:
    """What other processes are told of this one's error: rank, machine and message."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return pickle.dumps((distributed.get_rank(), node(), text))


def _broadcast(value: T) -> T:
    """The main process's `value` on every process, pickled, in parts that any GPU has room for."""
    device, main = PartialState().device, is_main()
    data = bytearray(pickle.dumps(value, protocol=5)) if main else bytearray()
    size = torch.tensor([len(data)], device=device)
    distributed.broadcast(size, src=0)
    content = torch.frombuffer(data, dtype=torch.uint8) if main else torch.empty(int(size), dtype=torch.uint8)
    for part in content.split(CHUNK):
        sent = part.to(device)
        distributed.broadcast(sent, src=0)
        if not main:
            part.copy_(sent)
    return value if main else pickle.loads(content.numpy())
