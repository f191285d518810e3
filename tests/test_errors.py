"""How a script ends: one line and an exit code for errors that the user can mend, a traceback for our own."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch

from kd.errors import ENDINGS, SET_BY_LAUNCHERS, Preempted, UserError, exit_code, nearest
from tests.run_scripts import script


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("--lr 0:\n give more"), 2, "error: --lr 0: give more\n"),
        (Preempted(signal.SIGTERM, "step 5"), 143, "preempted and saved: step 5\n"),
        (KeyboardInterrupt(), 130, "interrupted: continue with --resume\n"),
        (KeyboardInterrupt(signal.SIGTERM), 143, "--resume"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "give a smaller --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "give a smaller --batch-size"),
        (torch._dynamo.exc.Unsupported("no"), 2, "add --no-compile"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: cannot write to disk: free some space, then continue with"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            2,
            "no permission (Permission denied: /x)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_row_47_an_error_that_the_user_can_mend_is_one_line(error, code, words, capsys):
    def work():
        raise error

    assert exit_code(work, "continue with --resume") == code
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
        exit_code(work, "")


def test_nearest_names_similar_names_or_all():
    assert nearest("resnet19", ["resnet18", "vgg8"]) == "did you mean resnet18?"
    assert nearest("qqq", ["b", "a"]) == "there are a, b"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_says_by_whom_and_that_it_was_saved(number, capsys):
    def work():
        raise Preempted(number, "step 5 in run; continue with --resume")

    assert exit_code(work, "") == 128 + number
    how = {signal.SIGINT: "stopped", signal.SIGTERM: "preempted"}[number]
    assert capsys.readouterr().err == f"{how} and saved: step 5 in run; continue with --resume\n"


@pytest.mark.parametrize("variable", SET_BY_LAUNCHERS)
@pytest.mark.parametrize(
    "error", [UserError("--lr 0"), Preempted(signal.SIGINT, "step 5"), KeyboardInterrupt(), MemoryError()], ids=repr
)
def test_under_a_launcher_the_message_is_framed(variable, error, monkeypatch, capsys):
    """The launcher's own traceback follows, or precedes it after Ctrl-C."""
    monkeypatch.setenv(variable, "NO")

    def work():
        raise error

    assert exit_code(work, "nothing was written") in (2, 130)
    before, rule, message, again, note, after = capsys.readouterr().err.splitlines()
    assert (before, rule, again, after) == ("", "-" * 80, "-" * 80, "")
    assert message.startswith(ENDINGS)
    assert "the launcher's" in note


BROKEN = {
    "imported": "x = [1][3]\n",
    "library": "import no_such_library\n",
    "syntax": "def net(:\n",
    "called": "def net(num_classes):\n    return {}['width']\n",
    "forward": """
from torch import nn
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(3, classes)
    def forward(self, image):
        return self.fc(image.mean((2, 3))) / widht
def net(num_classes):
    return Net(num_classes)
""",
    "training": """
from torch import nn
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(3, classes)
    def forward(self, image):
        if self.training and len(image) > 2:
            raise KeyError('width')
        return self.fc(image.mean((2, 3)))
def net(num_classes):
    return Net(num_classes)
""",
}
SHOWN = {
    "imported": "IndexError: list index out of range",
    "library": "ModuleNotFoundError: No module named 'no_such_library'",
    "syntax": "SyntaxError: invalid syntax",
    "called": "KeyError: 'width'",
    "forward": "NameError: name 'widht' is not defined",
    "training": "KeyError: 'width'",
}


@pytest.mark.parametrize("where", BROKEN)
def test_a_mistake_in_a_users_own_code_shows_its_own_traceback(where):
    Path("my_net.py").write_text(BROKEN[where])
    done = script("train_teacher.py", "--data", "digits", "--model", "my_net:net", "--epochs", "1", "--threads", "1")
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    what = SHOWN[where]
    assert lines[-1].startswith(f"error: {Path('my_net.py').resolve()}, line ")
    assert what in lines[-1]
    assert lines[-1].endswith("; mend that code")
    shown = [line for line in lines if line.lstrip().startswith("File ")]
    assert len(shown) == 1, done.stderr
    assert "my_net.py" in shown[0]


def test_a_module_that_is_not_there_is_one_line():
    done = script("train_teacher.py", "--data", "digits", "--model", "nowhere:net", "--threads", "1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot import nowhere" in done.stderr


def test_no_test_sees_a_gpu():
    """They compare bits on the CPU; what a script of a test starts inherits it."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" or os.environ.get("KD_TEST_GPU") == "1"
