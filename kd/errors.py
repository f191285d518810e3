"""What goes wrong through no fault of the program, and how a script ends then."""

import difflib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable

# What a disk says that takes no more: full, the user's share of it, read-only, a file's largest size, broken.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


class UserError(ValueError):
    """The user can mend this: one line naming the value and the remedy; the script exits with 2."""


class Preempted(Exception):
    """Training was asked to stop (SIGTERM or Ctrl-C) and has saved its state."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def nearest(name: str, names: Iterable[str]) -> str:
    """'did you mean a or b?' for a mistyped name, or all the names where nothing is near."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def exit_code(work: Callable[[], None], interrupted: str = "the last checkpoint stands; continue with --resume") -> int:
    """Run `work`; what the user can mend becomes one line on stderr and a code instead of a traceback.

    `interrupted`: what is left after Ctrl-C, or another signal whose number a KeyboardInterrupt carries.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names on a disk are bytes, and not always text
    try:
        work()
    except UserError as error:
        return _print_error(f"error: {error}", 2)
    except Preempted as stop:
        return _print_error(f"preempted: {stop}", 128 + stop.signal_number)
    except (RuntimeError, MemoryError, OSError) as error:
        remedy = remedy_for(error)
        if remedy is None:
            raise
        return _print_error(f"error: {remedy}", 2)
    except KeyboardInterrupt as stop:
        return _print_error(f"interrupted: {interrupted}", 128 + next(iter(stop.args), signal.SIGINT))
    return 0


def remedy_for(error: BaseException) -> str | None:
    """What to do about an error of torch's or the system's that the user can mend; None for any other."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in DISK:
        return f"the disk takes no more ({text[:200]}): free some space; what is saved stands, --resume continues it"
    if "Expected to have finished reduction" in text:
        return (
            "some parameters got no gradient, which several processes cannot train together: freeze them"
            f" (requires_grad_(False)) or train on one process ({text[-120:]})"
        )
    if "OutOfMemory" in text or "MemoryError" in text or "can't allocate memory" in text:
        return f"out of memory: give a smaller --batch-size, which changes the recipe ({text[:200]})"
    if "DataLoader worker" in text:  # torch's word for a process that decodes images
        return f"a worker that decodes images died: give fewer --workers, or 0, and --resume ({text[:200]})"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"the step could not be compiled: add --no-compile ({text[:200]})"
    return None


def _print_error(message: str, code: int) -> int:
    # All processes of one run fail with the same message; the first is enough, unless it is another's alone.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        message = f"[process {os.environ.get('RANK')}] {message}"
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    return code
