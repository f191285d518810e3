"""kd.train and kd.distill: the scripts called from Python, as often as wanted; the progress display in a notebook."""

import itertools
import json
import os
import random
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console

import kd
from kd.config import KDConfig, NoneConfig, TrainConfig
from kd.config.defaults import distill_defaults, train_defaults
from kd.errors import Preempted, UserError
from kd.training import python
from kd.training.progress import ProgressDisplay
from kd.training.python import read_flags
from kd.training.trainer import Trainer
from kd.utils.system import script_path
from tests.conftest import ROOT
from tests.losses.test_methods import FEW
from tests.run_scripts import differences, distil, teach

SMALL = {
    "data": "synthetic",
    "classes": 4,
    "val_fraction": 0.8,
    "batch_size": 40,
    "epochs": 2,
    "lr": 0.001,
    "save_every": 1,
    "log_every": 1,
    "wandb": "disabled",
}


def test_flags_are_those_of_the_command_line():
    config = read_flags(
        distill_defaults, {"preset": "digits", "teacher": ["A", "B"], "method": "dkd", "beta": 2.0, "epochs": None}
    )
    assert (config.preset, config.teacher, config.method.beta, config.fit.epochs) == ("digits", ("A", "B"), 2.0, 30)
    config = read_flags(
        distill_defaults, {"control": True, "flip": False, "lr": 1e-05, "kd_alpha": 0.2, "method": "at+kd"}
    )
    assert config.control
    assert not config.views.flip
    assert (config.fit.lr, config.method.kd_alpha) == (1e-5, 0.2)
    assert read_flags(distill_defaults, {"temperature": 3}).method == KDConfig(temperature=3.0)
    assert read_flags(train_defaults, {"model": "resnet8", "label_smoothing": 0.1}).method == NoneConfig(0.1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"epohs": 3}, r"epohs: no such flag; did you mean .*epochs"),
        ({"method": "nkd", "standardize": True}, "standardize: is no flag of nkd, but of kd, mimic"),
        ({"method": "mlkd", "temperatures": []}, "temperatures: has no value; give one or more"),
        ({"method": ""}, "^method: has no value"),
        ({"method": "dkdd"}, "dkdd: no such method; did you mean dkd"),
        ({"method": "dkd", "temprature": 3}, "temprature: no such flag; did you mean temperature"),
        ({"epochs": "x"}, "Error parsing --epochs"),
        ({"preset": "digitz"}, "'digitz'.*Expected one of"),
        ({"epochs": 0}, "--epochs 0: give 1 or more"),
        ({"resume": True, "auto_resume": True}, "--resume and --auto-resume"),
    ],
)
def test_what_is_wrong_is_an_error_and_no_exit(flags, words, capsys):
    with pytest.raises(UserError, match=words) as caught:
        kd.distill(**flags)
    assert "\n" not in str(caught.value)
    assert "╭" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_a_configuration_or_flags_and_of_the_right_kind():
    with pytest.raises(UserError, match="give a configuration, or flags, not both"):
        kd.train(train_defaults("digits"), epochs=3)
    with pytest.raises(UserError, match=r"DistillConfig: give a kd\.config\.TrainConfig"):
        kd.train(distill_defaults("digits"))
    with pytest.raises(UserError, match="--batch-size 0"):
        kd.train(TrainConfig(fit=kd.config.FitConfig(batch_size=0)))


def test_it_gives_the_bytes_of_the_scripts_and_several_runs_fit_into_one_process():
    teach("--model", "resnet14", *FEW, "--log-every", "1", "--out", "teacher")
    distil("--student", "resnet8", "--teacher", "teacher", *FEW, "--log-every", "1", "at", "--out", "student")
    AcceleratorState._reset_state(reset_partial_state=True)
    teacher = kd.train(**SMALL, model="resnet14", out="one")
    assert differences(Path("teacher"), teacher.folder) == []
    half = kd.train(**SMALL, model="resnet8", mixed_precision="bf16", out="half")
    assert half.folder == Path("half")
    student = kd.distill(**SMALL, student="resnet8", teacher="teacher", method="at", out="two")
    assert differences(Path("student"), student.folder) == []
    assert student.classes == teacher.classes
    assert not student.training


def test_the_process_is_as_before(monkeypatch):
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    torch.set_num_threads(2)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), dict(os.environ)
    flags = {**SMALL, "model": "resnet8", "threads": 1, "deterministic": True, "out": "run"}
    python.run_script("train_teacher", None, flags)
    identity = json.loads(Path("run/config.json").read_text())["identity"]
    assert identity["mixed_precision"] == "no", "the caller's own is none of the run's"
    assert mine.mixed_precision == AcceleratorState().mixed_precision == "bf16"
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(before[0], torch.get_rng_state())
    assert (np.random.get_state()[1].tolist(), dict(os.environ)) == before[1:]
    torch.set_num_threads(1)
    with python.own_process():
        state = random.getstate()
        random.seed(7)
    assert random.getstate() == state


SETTINGS = {
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "matrices": torch.get_float32_matmul_precision,
    "benchmark": lambda: torch.backends.cudnn.benchmark,
    "tf32": lambda: torch.backends.cudnn.allow_tf32,
    "cublas": lambda: os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
}
QUICKEST = {"deterministic": False, "matrices": "high", "benchmark": True, "tf32": True, "cublas": None}
REPEATABLE = {"deterministic": True, "matrices": "highest", "benchmark": False, "tf32": False, "cublas": ":4096:8"}


@pytest.mark.parametrize(("deterministic", "inside"), [(False, QUICKEST), (True, REPEATABLE)])
def test_a_deterministic_run_computes_repeatably_and_leaves_the_callers_settings(monkeypatch, deterministic, inside):
    read = lambda: {name: setting() for name, setting in SETTINGS.items()}  # noqa: E731
    found, real = [], Trainer.record

    def record(trainer, *args):
        found.append(read())
        real(trainer, *args)

    monkeypatch.setattr(Trainer, "record", record)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        kd.train(**SMALL | {"epochs": 1}, model="resnet8", deterministic=deterministic, out="run")
        assert found == [inside] * len(found)
        assert len(found) == 2
        assert read() == QUICKEST
    finally:
        torch.set_float32_matmul_precision(precision)


def test_row_37_ctrl_c_saves_and_the_same_call_resumes(monkeypatch):
    """As interrupting the notebook's kernel does."""
    kd.train(**SMALL, model="resnet8", out="whole")
    record = Trainer.record

    def interrupt(trainer, result, batch):
        record(trainer, result, batch)
        if trainer.state.step == 3:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="step 3 in run; continue with resume=True"):
        patch.setattr(Trainer, "record", interrupt)
        kd.train(**SMALL, model="resnet8", out="run")
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(UserError, match="run has an unfinished run"):
        kd.train(**SMALL, model="resnet8", out="run")
    kd.train(**SMALL, model="resnet8", out="run", resume=True)
    assert differences(Path("whole"), Path("run")) == []


def test_a_failed_runs_tracker_is_closed_and_another_ones_is_not(monkeypatch):
    closed = []
    wandb = types.SimpleNamespace(run=None, finish=lambda exit_code: closed.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ZeroDivisionError), python.own_process():
        wandb.run = "ours"
        raise ZeroDivisionError
    assert closed == [1]
    with python.own_process():  # ours of before is the caller's now
        pass
    assert closed == [1]


def test_out_of_memory_is_the_message_of_the_scripts(monkeypatch):
    def full(config):
        raise MemoryError

    monkeypatch.setattr(python, "import_script", lambda name: types.SimpleNamespace(main=full))
    with pytest.raises(UserError, match="out of memory: give a smaller --batch-size"):
        kd.train(**SMALL)


def test_the_scripts_are_those_beside_kd(monkeypatch):
    for name in ("train_teacher", "distill_student"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(ROOT))])
    module = python.import_script("distill_student")
    assert Path(module.__file__) == ROOT / "distill_student.py"
    assert module.train is sys.modules["train_teacher"].train
    with pytest.raises(
        UserError, match=r"nothing.py: no such file; the scripts lie beside kd/, so work from the check"
    ):
        script_path("nothing.py")


class Place:
    """What IPython's display returns: a place whose content is replaced."""

    def __init__(self):
        self.shown: list[str] = []

    def update(self, content) -> None:
        console = Console(width=120)
        with console.capture() as text:
            console.print(content)
        self.shown.append(text.get())


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setattr("kd.training.progress.console", Console(force_jupyter=True))
    return monkeypatch


def show_epochs(display: ProgressDisplay, count: int) -> None:
    with display:
        for epoch in range(1, count + 1):
            numbers = {"train/loss": 0.5, "train/top1": 50.0}
            for step in range(4):
                display.step(4 * (epoch - 1) + step + 1, numbers)
            display.epoch({"epoch": epoch, "step": 4 * epoch, "val/loss": 0.25, "val/top1": 75.0, **numbers})


def test_in_a_notebook_the_bars_are_updated_in_one_place(notebook, capsys):
    places, ticks = [], itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: next(ticks) / 200)  # asked at least once a step
    notebook.setattr("kd.training.progress.time", clock)

    def display(content, display_id: bool) -> Place:
        assert display_id
        places.append(Place())
        return places[-1]

    notebook.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    notebook.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    show_epochs(ProgressDisplay("kd resnet8", 4, 200, 0, shown=True), 50)
    (place,) = places
    assert len(place.shown) <= 5, "at most two a second, and the last state"
    assert "200/200" in place.shown[-1]
    assert "epoch 50/50" in place.shown[-1]
    assert "val loss 0.250" in place.shown[-1]
    assert capsys.readouterr().out == ""
    show_epochs(ProgressDisplay("kd resnet8", 4, 200, 0, shown=False), 1)
    assert len(places) == 1


def test_without_ipython_there_is_a_line_an_epoch(notebook, capsys):
    notebook.setitem(sys.modules, "IPython", None)
    show_epochs(ProgressDisplay("kd resnet8", 4, 12, 0, shown=True), 3)
    assert capsys.readouterr().out.count("val/loss 0.2500") == 3
