"""How many processor cores there are to work with. No torch here."""

import fcntl
import os
import signal
import warnings
from contextlib import suppress
from pathlib import Path

import psutil


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores() -> int:
    """Those for each of this machine's processes of one run."""
    return max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


#: (kd.lock) A lock on a file that dies with its process.


class Lock:
    """An exclusive lock of this process; released by `close`, or when the process dies, however it dies.

    fcntl.lockf, not flock: a flock outlives a kill -9 in any worker that was forked meanwhile.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = None

    def acquire(self, wait: bool = False) -> bool:
        """True if the lock is ours; without `wait`, False at once where another process holds it."""
        self._file = open(self.path, "a")  # noqa: SIM115  held open as long as the lock
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):  # for a lock that is held POSIX leaves a system the choice
            self.close()
            return False
        except OSError as error:  # a file system without locks
            warnings.warn(f"{self.path}: no file locks here ({error}); start no second run on it", stacklevel=2)
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


#: (kd.signals) Being asked to stop: remembered until training can save, instead of dying in the middle of a step.


class StopRequests:
    """Within it SIGTERM and the first Ctrl-C set `number`; a second Ctrl-C stops at once."""

    def __init__(self):
        self.number = 0
        self._before = {}

    def __enter__(self) -> "StopRequests":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # only the main thread may; elsewhere the caller's own handling stands
                break
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number != signal.SIGINT:  # torchrun follows Ctrl-C up with SIGTERM
            self.number = number


def memory_limit() -> int:
    """Bytes that the machine has, or that this container may use of them."""
    limits = [psutil.virtual_memory().total]
    for path in limit_files():
        with suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(path.read_text()))
    return min(limits)


def limit_files() -> list[Path]:
    """Where Linux may keep a limit of this process's memory: its control group, those above it, the older layout."""
    root, place = Path("/sys/fs/cgroup"), "/"
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        place = next((line[3:] for line in lines if line.startswith("0::")), "/")
    own = root / place.lstrip("/")
    groups = [own, *(above for above in own.parents if above.is_relative_to(root))]
    return [*(group / "memory.max" for group in groups), root / "memory" / "memory.limit_in_bytes"]
