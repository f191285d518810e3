"""How a script ends: one line and an exit code for errors that the user can mend, a traceback for our own."""

import errno
import signal

import pytest
import torch

from kd.errors import Preempted, UserError, exit_code, nearest


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("--lr 0:\n give more"), 2, "error: --lr 0: give more\n"),
        (Preempted(signal.SIGTERM, "saved"), 143, "preempted: saved\n"),
        (KeyboardInterrupt(), 130, "interrupted: the last checkpoint is intact; continue with --resume\n"),
        (KeyboardInterrupt(signal.SIGTERM), 143, "--resume"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "give a smaller --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "give a smaller --batch-size"),
        (torch._dynamo.exc.Unsupported("no"), 2, "add --no-compile"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: cannot write to disk: free some space, then continue with"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_row_47_an_error_that_the_user_can_mend_is_one_line(error, code, words, capsys):
    def work():
        raise error

    assert exit_code(work) == code
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


def test_a_tool_says_itself_what_an_interruption_leaves(capsys):
    def work():
        raise KeyboardInterrupt

    assert exit_code(work, "nothing was written") == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"


def test_our_own_errors_keep_their_traceback():
    def work():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        exit_code(work)


def test_nearest_names_similar_names_or_all():
    assert nearest("resnet19", ["resnet18", "vgg8"]) == "did you mean resnet18?"
    assert nearest("qqq", ["b", "a"]) == "there are a, b"
