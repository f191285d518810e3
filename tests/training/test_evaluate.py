"""Scoring: a split is placed once, in batches that suit the device, and not compiled unless that pays."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

import kd
from kd.config import DataConfig
from kd.data import Split, load_data
from kd.data.rows import MappedRows
from kd.data.workers import EncodedImages, WorkerRows
from kd.metrics import top_k
from kd.training.evaluate import AT_ONCE, PAYS, Scorer, predict_logits, validation
from tests.fake_cuda import COPY, DEVICE, ROWS, Setting, accelerator_on_gpu, counting, training
from tests.run_scripts import distil, teach
from tests.training.test_faults import Share


def test_each_split_is_placed_once_over_all_validations(monkeypatch):
    placed = []
    for kind in (Split, MappedRows):

        def on(split, device, real=kind.on):
            placed.append(len(split.labels))
            return real(split, device)

        monkeypatch.setattr(kind, "on", on)
    distil("--out", "run", "--epochs", "3", "--ema", "0.9", "--control")
    rows = {"train": 900, "val": 100, "test": 250}
    # Teacher, control and student; the student's test scores include its best and averaged weights and the teacher's.
    assert sorted(placed) == sorted(3 * list(rows.values()))


def test_the_weights_of_the_best_epoch_are_kept_scored_and_loaded(monkeypatch):
    epochs, accuracies = [], [10.0, 60.0, 30.0]

    def scored(network, scorer):
        epochs.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return {"val/loss": 1.0, "val/top1": accuracies[len(epochs) - 1]}

    monkeypatch.setattr("kd.training.trainer.validate", scored)
    teach("--model", "resnet8", "--out", "run", "--epochs", "3", "--val-fraction", "0.5")
    summary = json.loads(Path("run/summary.json").read_text())
    assert [summary[key] for key in ("best_epoch", "val_top1_best", "val_top1_last")] == [2, 60.0, 30.0]
    data = load_data(DataConfig(source="synthetic", val_fraction=0.5))
    for weights, file, epoch, score in (("best", "best", 1, "test_top1_best"), ("last", "model", 2, "test_top1")):
        network = kd.load("run", weights=weights)
        for tensors in (load_file(f"run/{file}.safetensors"), network.state_dict()):
            assert tensors.keys() == epochs[epoch].keys()
            assert all(torch.equal(tensor, epochs[epoch][name]) for name, tensor in tensors.items())
        logits = predict_logits(network, data.test, data, Accelerator(cpu=True), 50)
        assert summary[score] == top_k(logits, data.test.labels, 1)
    assert not torch.equal(epochs[1]["fc.weight"], epochs[2]["fc.weight"])
    assert summary["test_top1_best"] != summary["test_top1"]


def test_on_a_gpu_only_the_first_validation_copies():
    with training(Setting(fit={"ema": 0.9})) as (trainer, _):
        copies = []
        for _ in range(3):
            with counting(may_copy=True) as launches:
                trainer._scorer.logits(trainer.distiller.deployed)
            copies.append(launches[COPY])
            assert launches["convolution"] == 9 * ROWS // AT_ONCE
    assert copies[0] > 0
    assert copies[1:] == [0, 0]


class Watched(nn.Module):
    """Remembers how many images it was asked about."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        return images.flatten(1)[:, :100]


@pytest.mark.parametrize(
    ("trained", "rows", "size", "sizes"),
    [
        (8, 512, (32, 32), [256, 256]),
        (8, 500, (32, 32), [256, 256]),  # the last batch is filled up: another size would be compiled again
        (400, 500, (32, 32), [400, 400]),
        (8, 100, (32, 32), [100]),
        (8, 100, (448, 448), [64, 64]),
        (8, 60, (2240, 2240), [8] * 8),
    ],
)
def test_a_gpu_scores_in_batches_of_its_own_all_of_one_size(trained, rows, size, sizes):
    network = Watched()
    with training(Setting()) as (trainer, _):
        data = dataclasses.replace(trainer.data, size=size)
        split = Split(torch.zeros(rows, 3, *size, dtype=torch.uint8), torch.zeros(rows, dtype=torch.long))
        scorer = Scorer(split, data, trainer.accelerator, trained)
        scorer.rows = rows
        scorer.share = scorer._share(trained)
        logits = scorer.logits(network)
    assert network.sizes == sizes
    assert (logits.device, logits.shape) == (DEVICE, (rows, 100))


@pytest.mark.parametrize(("processes", "share"), [(1, 256), (4, 128), (1000, 1)])
def test_no_process_of_many_is_left_with_everything(processes, share, monkeypatch):
    data = load_data(DataConfig(source="synthetic"))
    with accelerator_on_gpu() as accelerator:
        monkeypatch.setattr(Accelerator, "num_processes", processes)
        split = Split(torch.zeros(512, 3, 1, 1, dtype=torch.uint8), torch.zeros(512, dtype=torch.long))
        assert Scorer(split, data, accelerator, 8 * processes if processes < 100 else 8).share == share


def test_on_a_cpu_batches_are_those_of_training_as_they_always_were():
    data = load_data(DataConfig(source="synthetic"))
    for batch, sizes in ((100, [100, 100, 50]), (500, [250])):
        network = Watched()
        predict_logits(network, data.test, dataclasses.replace(data, classes=("",) * 100), Accelerator(cpu=True), batch)
        assert network.sizes == sizes
    assert Scorer(data.test, data, Share(1, 4), 50).share == 12


@pytest.mark.parametrize(
    ("fit", "pays"),
    [({"epochs": PAYS // 2}, True), ({"epochs": PAYS // 2 - 1}, False), ({"epochs": PAYS // 4, "ema": 0.9}, True)],
)
def test_scoring_is_compiled_from_so_many_batches_of_a_run_on(fit, pays):
    data = load_data(DataConfig(source="synthetic"))  # with 100 images to validate on
    job = Setting(fit={"batch_size": 50, **fit}).job
    assert validation(data, job, Accelerator(cpu=True)).compiles == pays


def test_rows_of_workers_are_scored_in_batches_of_the_trainings_size():
    """Those fit the memory that workers share; larger ones would end the run at its first validation."""
    data = load_data(DataConfig(source="synthetic"))
    images = EncodedImages(None, "image", "test", None, (16, 16), 0, np.arange(250))
    by_workers = dataclasses.replace(data, test=WorkerRows(images, data.test.labels))
    with accelerator_on_gpu() as accelerator:
        assert Scorer(by_workers.test, by_workers, accelerator, 4).share == 4
        assert Scorer(data.test, data, accelerator, 4).share > 4
