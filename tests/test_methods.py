"""Every method through the real script: it trains, resumes to the same bytes, and its network can be loaded."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import kd
from kd.config import METHODS, DataConfig
from kd.data import load_data
from kd.errors import UserError
from kd.fit import predict
from tests.runs import differences, distil, metrics_of, teach
from tests.test_resume import Killed, die_at

FEW = [
    "--classes",
    "4",
    "--val-fraction",
    "0.8",
    "--batch-size",
    "40",
    "--epochs",
    "2",
    "--lr",
    "0.001",
    "--save-every",
    "1",
]  # 80 images: 4 steps
FLAGS = {"crd": ["--negatives", "64"], "dkd": ["--ramp-epochs", "2"]}
FEATURES = [name for name, kind in METHODS.items() if "student_layers" in kind.__dataclass_fields__]
LOGITS = [name for name, kind in METHODS.items() if "standardize" in kind.__dataclass_fields__]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--model", "resnet14", *FEW, "--out", "resnet14")
        teach("--model", "tests.networks:plain", *FEW, "--out", "plain")
    return str(folder / "resnet14")


def student(teacher: str, method: str, *args: str) -> None:
    distil("--student", "resnet8", "--teacher", teacher, "--trust-code", *FEW, method, *FLAGS.get(method, []), *args)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_resumes_to_the_same_bytes(teacher, method, monkeypatch):
    student(teacher, method, "--out", "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 3)
        student(teacher, method, "--out", "run")
    student(teacher, method, "--out", "run", "--resume")
    assert differences(Path("whole"), Path("run")) == []
