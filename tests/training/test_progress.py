"""The display on a terminal and off it."""

import io

import pytest
import torch
from rich.console import Console

from kd.training import progress
from kd.training.meter import Clock
from kd.training.progress import ProgressDisplay

LINE = {"epoch": 1, "step": 10, "train/loss": 1.25, "train/top1": 40.0, "val/loss": 1.5, "val/top1": 35.0}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_keeps_a_line_an_epoch_that_is_never_wrapped(monkeypatch, width):
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=True, width=width, color_system=None))
    with ProgressDisplay("kd my_package.some.deep.module:a_network_with_a_long_name", 10, 20, 0, True) as display:
        display.step(10, {"train/loss": 1.25, "train/top1": 40.0, "images_per_second": 1234.0})
        display.epoch(LINE | {"images_per_second": 1234.0})
    lines = [line for line in out.getvalue().splitlines() if "epoch 1/2  loss 1.250" in line]
    assert len(lines) == 1
    assert all(len(line) <= width + 20 for line in out.getvalue().splitlines())  # control codes aside
    if width == 120:
        assert "val loss 1.500  val top1 35.0  1234 images/s" in lines[0]


def test_off_a_terminal_there_is_a_plain_line(monkeypatch, capsys):
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_terminal=False))
    with ProgressDisplay("teacher resnet8", 10, 20, 0, True) as display:
        display.epoch(LINE)
    out = capsys.readouterr().out
    assert out.startswith("teacher resnet8  epoch 1/2  train/loss 1.2500  train/top1 40.00  val/loss 1.5000")
    assert out.count("\n") == 1


def test_the_clock_of_a_training_on_the_cpu_asks_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("a CUDA context for nothing"))
    clock = Clock({}, torch.device("cpu"))
    for _ in range(12):
        clock.step(8)
    assert clock.timing["images"] == 16
