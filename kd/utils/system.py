"""Cores, memory, file locks and stop signals of this machine. No torch here."""

import fcntl
import os
import platform
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from kd.errors import UserError, require


def expand_user(name: str | Path, flag: str = "") -> Path:
    """`name`, the value of `flag` if it is one, with ~ expanded. Raises UserError if that user does not exist."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{flag} {name}: no such file or folder ({error})".lstrip()) from error


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores() -> int:
    """Cores for each of a run's processes on this machine."""
    return max(cores() // processes_here(), 1)


def processes_here() -> int:
    """The run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory_limit() -> int:
    """Bytes of memory in the machine, or this container's limit if that is lower."""
    limits = [psutil.virtual_memory().total]
    for path in limit_files():
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(path.read_text()))
    return min(limits)


def limit_files() -> list[Path]:
    """Files in which Linux may state this process's memory limit: of cgroup v2, its group and those above; of v1."""
    root, group = Path("/sys/fs/cgroup"), "/"
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = next((line[3:] for line in lines if line.startswith("0::")), "/")
    own = root / group.lstrip("/")
    groups = [own, *(above for above in own.parents if above.is_relative_to(root))]
    return [*(folder / "memory.max" for folder in groups), root / "memory" / "memory.limit_in_bytes"]


def script_path(name: str) -> Path:
    """A script of the project, which lies beside kd/. Raises UserError if it does not."""
    path = Path(__file__).resolve().parents[2] / name
    require(path.exists(), f"{path}: no such file; the scripts lie beside kd/, so work from the checkout")
    return path


class Lock:
    """An exclusive file lock of this process, released by `close` or when the process dies, even by kill -9.

    Uses fcntl.lockf, not flock: a flock survives a kill -9 in any worker that was forked meanwhile.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = None

    def acquire(self, wait: bool = False) -> bool:
        """Whether this process now has the lock; without `wait`, False at once if another process has it.

        True, with a warning, on a file system without locks.
        """
        self._file = open(self.path, "a")  # noqa: SIM115  stays open as long as the lock
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):  # POSIX allows either if another process has the lock
            self.close()
            return False
        except OSError as error:  # the file system has no locks
            warnings.warn(f"{self.path}: no file locks here ({error}); start no second run on it", stacklevel=2)
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class StopRequests:
    """Remembers SIGTERM and the first Ctrl-C in `number`, so that training can save; a second Ctrl-C stops at once."""

    def __init__(self):
        self.number = 0
        self._before = {}

    def __enter__(self) -> "StopRequests":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # outside the main thread the caller's own handlers stay
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


def cpu_name() -> str:
    """The processor by its maker's name, as far as the system tells it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return name
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C inside the block, so that half-written files are removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
