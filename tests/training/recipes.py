"""Trainings of milliseconds through the Trainer itself, without the scripts: two epochs of four steps."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from kd.config import DataConfig, FitConfig, Job, KDConfig, NoneConfig, RunConfig, ViewConfig
from kd.data import load_data
from kd.losses.base import Distiller
from kd.models import build_model
from kd.runs.folder import RunFolder
from kd.teachers.live import live_logits
from kd.teachers.load import TeacherNetwork
from kd.training.setup import build_distiller
from kd.training.trainer import Trainer
from tests.run_scripts import newest_checkpoint

DATA = DataConfig(source="synthetic", val_fraction=0.8)  # 200 training images
STEPS = 4  # an epoch


class Killed(BaseException):
    """Ends a training as abruptly as a process can be ended from inside."""


@cache
def data():
    return load_data(DATA)


def fit_of(**flags) -> FitConfig:
    fit = FitConfig(**{"epochs": 2, "batch_size": 50, "lr": 0.01} | flags)
    fit.check()
    return fit


def train(folder: str, fit: FitConfig, model: str = "normalised", taught: bool = False, kill: int = 0) -> Distiller:
    """Train tests.networks:`model` in `folder`, from its newest checkpoint if there is one.

    `kill`: the step at which the training dies; a checkpoint is then saved after every third step.
    """
    path = Path(folder)
    method = KDConfig() if taught else NoneConfig()
    run_config = RunConfig(out=folder, wandb="disabled", save_every=3 if kill else 0)
    role = "kd" if taught else "teacher"
    job = Job(role, "report", f"tests.networks:{model}", method, DATA, ViewConfig(), fit, run_config)
    run = RunFolder(path, {}, resuming=path.exists())
    path.mkdir(exist_ok=True)
    accelerator, teacher, logits = Accelerator(cpu=True), None, None
    if taught:
        torch.manual_seed(0)
        network = build_model("tests.networks:plain", 10, data().size).eval().requires_grad_(False)
        teacher = TeacherNetwork(network, Path("teacher"), "", {"model": "tests.networks:plain"}, 10)
        logits = live_logits(network, accelerator)
    distiller = build_distiller(job, data(), teacher)
    with Trainer(job, data(), accelerator, run, distiller, logits) as trainer:
        for epoch in trainer.epochs():
            for batch in trainer.batches(epoch):
                trainer.step(batch)
                if trainer.state.step == kill:
                    raise Killed
            trainer.end_epoch(epoch)
    return distiller


def lines_of(folder: str) -> list[dict]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def last_checkpoint(folder: str) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint as bytes, the optimizer's groups, and the epochs' lines."""
    saved = newest_checkpoint(Path(folder))
    found = {
        f"{path.name}: {name}": tensor.numpy().tobytes()
        for path in saved.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    groups = json.loads((saved / "state.json").read_text())["optimizer"]
    return found | {"groups": json.dumps(groups).encode(), "lines": json.dumps(lines_of(folder)).encode()}


def differ_when_killed(fit: FitConfig, model: str = "normalised", kill: int = 7, **options) -> list[str]:
    """What differs between a training undisturbed and one killed at a step, then resumed."""
    train("whole", fit, model, **options)
    with pytest.raises(Killed):
        train("run", fit, model, kill=kill, **options)
    assert newest_checkpoint(Path("run")).name == f"step-{kill - kill % 3}"
    train("run", fit, model, **options)
    ours, theirs = last_checkpoint("whole"), last_checkpoint("run")
    assert all(math.isfinite(line["train/loss"]) for line in lines_of("run"))
    return [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
