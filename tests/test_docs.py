"""The README's page on your own data: every command on it, as written, on a folder of photographs made here."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd.models import libraries
from tests.conftest import ROOT

HEADING = "## Your own data, from photographs to a student"


def commands() -> list[str]:
    page = (ROOT / "README.md").read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    return [line.strip() for line in page.splitlines() if line.startswith("    ")]


def photographs(folder: Path) -> None:
    """Three classes of one colour each, under noise, in many sizes."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 12)):
        for label, colour in {"brick": (170, 80, 60), "grass": (80, 150, 60), "sky": (90, 130, 200)}.items():
            place = folder / split / label
            place.mkdir(parents=True)
            for number in range(count):
                high, wide = draw.integers(36, 90, 2)
                pixels = np.array(colour) + draw.normal(0, 40, (high, wide, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number}.jpg")


def pretrained(folder: Path) -> None:
    """What torchvision would fetch, made here: weights of its resnet18 that have learned nothing."""
    libraries.define_operators()
    from torchvision.models import ResNet18_Weights, resnet18

    folder.mkdir(parents=True)
    torch.save(resnet18().state_dict(), folder / Path(ResNet18_Weights.DEFAULT.url).name)


@pytest.mark.slow
def test_every_command_runs_as_written(monkeypatch, tmp_path):
    photographs(tmp_path / "photos")
    pretrained(tmp_path / "torch" / "hub" / "checkpoints")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    # The tests may run in an environment that was never activated.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("kd", "train_teacher.py", "distill_student.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert len(commands()) == 4, "one line of the page, one command"
    for command in commands():
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (command, done.stderr[-2000:])
    fine_tuned = [json.loads(path.read_text())["resized"] for path in Path("runs/report").glob("teacher-*/model.json")]
    assert [224, 224] in fine_tuned, "the size at which the network from elsewhere sees them"
    assert "Common and rare classes" in Path("report/report.md").read_text()
    distilled = json.loads(next(Path("runs/report").glob("kd-*/summary.json")).read_text())
    assert distilled["test_images"] == 36
    shutil.rmtree(tmp_path / "torch")
