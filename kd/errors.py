"""Errors that the user can mend, and how a script ends: one line on stderr and an exit code.

Code 2 is an error that the user can mend, 128 + N a stop by signal N. A mistake in code of the user's own is shown with
that code's traceback before the line. Any other error is ours and keeps its traceback.
Under a launcher the line is framed: the launcher prints a traceback of its own, which a script cannot prevent.
"""

import difflib
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


class NoLabels(UserError):
    """Data in which no labels are found: a method that needs none can train on it."""

    REMEDY = ", or give --no-labels, for a method that needs none (kd --alpha 1)"

    def __init__(self, found: str):
        super().__init__(found + self.REMEDY)
        self.found = found


class UsersOwnError(UserError):
    """An exception in code of the user's own; `shown` is its traceback without our frames."""

    def __init__(self, message: str, shown: str):
        super().__init__(message)
        self.shown = shown


class OtherProcessError(UserError):
    """An error of another process of the run. `shown`: here too, because that process is on another machine."""

    def __init__(self, message: str, shown: bool = False):
        super().__init__(message)
        self.shown = shown


USERS_FILES: set[str] = set()
"""The files of the user's own code that was imported; kd.utils.users_own adds them."""

TOLD: list[Callable[[BaseException], None]] = []
"""What learns of an error before a script ends by it; kd.utils.processes adds the other processes of a run."""

# Frames that are not shown: ours, and the plumbing between a call of a network and its forward.
OUR_FOLDER = str(Path(__file__).parent) + os.sep
PLUMBING = (os.path.join("torch", "nn", "modules", "module.py"), os.path.join("importlib", "__init__.py"))


class Preempted(Exception):
    """Training stopped for a signal (SIGTERM or Ctrl-C), after it saved its state; the message says what and where."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


def require(condition: bool, message: str) -> None:
    """Raise UserError unless `condition` holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def reworded(change: Callable[[str], str]) -> Iterator[None]:
    """Pass a UserError's message through `change`; an error in code of the user's own stays as it is."""
    try:
        yield
    except UsersOwnError:
        raise
    except UserError as error:
        raise UserError(change(str(error))) from error


def nearest(name: str, names: Iterable[str]) -> str:
    """'did you mean a or b?' for a mistyped name, or all names if none is similar."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def users_own_error(error: BaseException, context: str = "") -> UsersOwnError:
    """`error`, which code of the user's own raised, as what is shown of it: that code's traceback, then one line."""
    shown = traceback.TracebackException.from_exception(error)
    place = _last_place(error, shown)
    _leave_out_our_frames(shown)
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    notes = "; ".join(filter(None, (context, *getattr(error, "__notes__", ()))))
    where = f"{place}: " if place else ""
    return UsersOwnError(f"{where}{said}{f' ({notes})' if notes else ''}; mend that code", "".join(shown.format()))


def is_users_own(error: BaseException) -> bool:
    """Whether code of the user's own raised `error`, or called what did."""
    return any(frame.f_code.co_filename in USERS_FILES for frame, _ in traceback.walk_tb(error.__traceback__))


def _last_place(error: BaseException, shown: traceback.TracebackException) -> str:
    """The innermost line of the user's own files in the traceback of `error`."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in shown.stack if frame.filename in USERS_FILES]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _leave_out_our_frames(shown: traceback.TracebackException | None) -> None:
    if shown is None:
        return
    theirs = [frame for frame in shown.stack if not _is_ours(frame.filename)]
    first = next((index for index, frame in enumerate(theirs) if frame.filename in USERS_FILES), 0)
    shown.stack = traceback.StackSummary.from_list(theirs[first:])
    for earlier in (shown.__cause__, shown.__context__):
        _leave_out_our_frames(earlier)


def _is_ours(file: str) -> bool:
    ours = file.startswith((OUR_FOLDER, "<")) and file not in USERS_FILES
    return ours or file.endswith(PLUMBING)


def exit_code(work: Callable[[], None], interrupted: str) -> int:
    """The exit code of `work`; prints one line for an error that the user can mend and lets others pass.

    `interrupted` says what to do after Ctrl-C, or after another signal: a KeyboardInterrupt carries its number.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names are bytes, and not always valid text
    try:
        with _telling():
            work()
    except UsersOwnError as error:
        return _print_users_own(error)
    except OtherProcessError as error:
        return _print_error(f"error: {error}", 2) if error.shown else 2
    except UserError as error:
        return _print_error(f"error: {error}", 2)
    except Preempted as stop:
        how = "stopped" if stop.signal_number == signal.SIGINT else "preempted"
        return _print_error(f"{how} and saved: {stop}", 128 + stop.signal_number)
    except Exception as error:
        remedy = remedy_for(error) if isinstance(error, RuntimeError | MemoryError | OSError) else None
        if remedy is not None:
            return _print_error(f"error: {remedy}", 2)
        if is_users_own(error):
            return _print_users_own(users_own_error(error))
        raise
    except KeyboardInterrupt as stop:
        return _print_error(f"interrupted: {interrupted}", 128 + next(iter(stop.args), signal.SIGINT))
    return 0


@contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except Preempted:
        raise  # all processes stop together
    except BaseException as error:
        for tell in TOLD:
            tell(error)
        raise


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` is a lack of memory, of a device or of the host."""
    text = f"{type(error).__name__}: {error}"
    return any(words in text for words in ("OutOfMemory", "MemoryError", "can't allocate memory"))


def remedy_for(error: BaseException) -> str | None:
    """The message for an error of torch or the system that the user can mend; None for any other."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in DISK:
        return (
            "cannot write to disk: free some space, then continue with --resume (saved checkpoints are intact)"
            f" ({text[:200]})"
        )
    if isinstance(error, PermissionError) and error.filename:
        return f"no permission ({error.strerror}: {error.filename}); name another path, or change its permissions"
    if "Expected to have finished reduction" in text:
        return (
            "some parameters got no gradient, which fails with several processes: freeze them (requires_grad_(False))"
            f" or train with one process ({text[-120:]})"
        )
    if "Expected more than 1 value per channel" in text:
        return (
            "BatchNorm got a single value for each channel: give a larger --batch-size, fewer processes, a smaller"
            " --accumulate, or larger images"
        )
    if "view size is not compatible" in text and not is_users_own(error):
        return (
            "a network uses .view on a map, which --channels-last lays out otherwise: write .reshape, or .flatten(1),"
            " in its place, or give --no-channels-last"
        )
    if "does not have a deterministic implementation" in text:
        return f"an operation has no kernel that repeats itself to the bit: leave --deterministic out ({text[:200]})"
    if is_out_of_memory(error):
        now = "".join(f" than {note}" for note in getattr(error, "__notes__", ())[:1])
        return f"out of memory: give a smaller --batch-size{now}, which changes the recipe ({text[:200]})"
    if "DataLoader worker" in text:  # torch's name for a process that decodes images
        return (
            f"a worker that decodes images died: give fewer --workers, or 0, and continue with --resume ({text[:200]})"
        )
    if "CUDAGraphs" in text:
        return f"a CUDA graph overwrote a result that is still needed: leave --compile-mode out ({text[:200]})"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"the step could not be compiled: add --no-compile ({text[:200]})"
    return None


def _print_users_own(error: UsersOwnError) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(error.shown, end="", file=sys.stderr)
    return _print_error(f"error: {error}", 2)


def _print_error(message: str, code: int) -> int:
    # All processes of a run may fail with the same message: all but the first say which they are.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        message = f"[process {os.environ.get('RANK')}] {message}"
    message = " ".join(message.split())
    if any(name in os.environ for name in SET_BY_LAUNCHERS):
        message = FRAME.format(rule=RULE, message=message)
    print(message, file=sys.stderr, flush=True)
    return code
