"""A lock on a file that dies with its process."""

import fcntl
import warnings
from pathlib import Path


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
