"""Errors that the user can mend, and how a script ends: one line on stderr and an exit code.

Code 2 is an error that the user can mend, 128 + N a stop by signal N. Any other error is ours and keeps its traceback.
Under a launcher the line is framed: the launcher prints a traceback of its own, which a script cannot prevent.
"""

import difflib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable

# Errors of a disk that cannot be written to: full, over quota, read-only, file too large, broken.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)

# What the last line of a script that did not finish begins with.
ENDINGS = ("error: ", "preempted and saved: ", "stopped and saved: ", "interrupted: ")

# Set by `accelerate launch` and by torchrun, always. Both print a traceback where a script's exit code is not 0.
SET_BY_LAUNCHERS = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
FRAME = "\n{rule}\n{message}\n{rule}\nA traceback beside these lines is the launcher's and says nothing more.\n"
RULE = "-" * 80


class UserError(ValueError):
    """An error that the user can mend, in one line with the value and the remedy."""


class Preempted(Exception):
    """Training stopped for a signal (SIGTERM or Ctrl-C), after it saved its state; the message says what and where."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


def require(condition: bool, message: str) -> None:
    """Raise UserError unless `condition` holds."""
    if not condition:
        raise UserError(message)


def nearest(name: str, names: Iterable[str]) -> str:
    """'did you mean a or b?' for a mistyped name, or all names if none is similar."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def exit_code(
    work: Callable[[], None], interrupted: str = "the last checkpoint is intact; continue with --resume"
) -> int:
    """The exit code of `work`; prints one line for an error that the user can mend and lets others pass.

    `interrupted` says what to do after Ctrl-C, or after another signal: a KeyboardInterrupt carries its number.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names are bytes, and not always valid text
    try:
        work()
    except UserError as error:
        return _print_error(f"error: {error}", 2)
    except Preempted as stop:
        how = "stopped" if stop.signal_number == signal.SIGINT else "preempted"
        return _print_error(f"{how} and saved: {stop}", 128 + stop.signal_number)
    except (RuntimeError, MemoryError, OSError) as error:
        remedy = remedy_for(error)
        if remedy is None:
            raise
        return _print_error(f"error: {remedy}", 2)
    except KeyboardInterrupt as stop:
        return _print_error(f"interrupted: {interrupted}", 128 + next(iter(stop.args), signal.SIGINT))
    return 0


def remedy_for(error: BaseException) -> str | None:
    """The message for an error of torch or the system that the user can mend; None for any other."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in DISK:
        return (
            "cannot write to disk: free some space, then continue with --resume (saved checkpoints are intact)"
            f" ({text[:200]})"
        )
    if "Expected to have finished reduction" in text:
        return (
            "some parameters got no gradient, which fails with several processes: freeze them (requires_grad_(False))"
            f" or train with one process ({text[-120:]})"
        )
    if "OutOfMemory" in text or "MemoryError" in text or "can't allocate memory" in text:
        return f"out of memory: give a smaller --batch-size, which changes the recipe ({text[:200]})"
    if "DataLoader worker" in text:  # torch's name for a process that decodes images
        return (
            f"a worker that decodes images died: give fewer --workers, or 0, and continue with --resume ({text[:200]})"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"the step could not be compiled: add --no-compile ({text[:200]})"
    return None


def _print_error(message: str, code: int) -> int:
    # All processes of a run may fail with the same message: all but the first say which they are.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        message = f"[process {os.environ.get('RANK')}] {message}"
    message = " ".join(message.split())
    if any(name in os.environ for name in SET_BY_LAUNCHERS):
        message = FRAME.format(rule=RULE, message=message)
    print(message, file=sys.stderr, flush=True)
    return code
