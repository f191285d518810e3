"""Compare images per second with torchdistill, interleaved in one process.

    python -m tests.versus_torchdistill DATA [OUT.json]

resnet56 -> resnet20 at batch 64 with plain KD, the same networks with random weights on both sides. torchdistill uses
its usual pipeline: torchvision transforms on PIL images, a DataLoader with one worker per core. Not a test: no timing
is asserted. Needs `pip install torchdistill`.
"""

import importlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from kd.bench.__main__ import BenchConfig
from kd.bench.measure import Workloads
from kd.data import load_data
from kd.models import build_model
from kd.models.cost import time_rounds
from kd.training.launch import start

STEPS, ROUNDS, BATCH = 10, 5, 64


class Pictures(torch.utils.data.Dataset):
    """The training split as transformed PIL images, stored as in torchvision's CIFAR100."""

    def __init__(self, data):
        from torchvision import transforms

        self.images, self.labels = data.train.images.permute(0, 2, 3, 1).numpy(), data.train.labels.tolist()
        crop_and_flip = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        to_tensor = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
        self.transform = transforms.Compose([*crop_and_flip, *to_tensor])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int):
        return self.transform(Image.fromarray(self.images[row])), self.labels[row]


def torchdistill_steps(data):
    """A workload of STEPS steps of torchdistill's own training loop."""
    for module in ("core.interfaces.forward_proc", "losses.high_level", "losses.mid_level", "losses.util"):
        importlib.import_module(f"torchdistill.{module}")  # registers its names
    from torchdistill.core.distillation import get_distillation_box

    path = {"student_module_path": ".", "student_module_io": "output"}
    path |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    loader = {"dataset_id": "train", "sampler": {"class_or_func": torch.utils.data.RandomSampler}}
    loader["kwargs"] = {"batch_size": BATCH, "num_workers": os.cpu_count(), "drop_last": True}
    network = {"forward_proc": "forward_batch_only", "forward_hook": {"input": [], "output": []}}
    config = {
        "num_epochs": 1,
        "train_data_loader": loader,
        "val_data_loader": loader,
        "teacher": {"requires_grad": False, **network},
        "student": network,
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {"key": "KDLoss", "kwargs": {**path, "temperature": 5.0, "alpha": 0.3}},
                        "weight": 1.0,
                    }
                },
            },
        },
    }
    networks = (build_model(name, len(data.classes), data.size) for name in ("resnet56", "resnet20"))
    box = get_distillation_box(*networks, {"train": Pictures(data)}, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    batches = iter(box.train_data_loader)

    def steps() -> None:
        for _ in range(STEPS):
            images, labels, extra = next(batches)
            box.pre_forward_process()
            box.post_forward_process(loss=box.forward_process(images, labels, extra))

    return steps


def main(source: str, out: str | None = None) -> None:
    config = BenchConfig(data=source, model="resnet20", teacher_model="resnet56", steps=STEPS)
    job = config.job()
    accelerator, data = start(job.fit, job.run), load_data(job.data)
    with tempfile.TemporaryDirectory() as folder:
        workloads = Workloads(job, config.teacher_model, STEPS, data, accelerator).all(Path(folder))
        compared = {"torchdistill": torchdistill_steps(data)} | {name: workloads[name] for name in ("live", "cached")}
        seconds = time_rounds(compared, (ROUNDS, ROUNDS))
    rates = {name: STEPS * BATCH / statistics.median(times) for name, times in seconds.items()}
    for name in ("live", "cached"):
        ratios = [torchdistill / kd for torchdistill, kd in zip(seconds["torchdistill"], seconds[name])]
        rates[f"{name}_over_torchdistill"] = statistics.median(ratios)
    print(json.dumps(rates, indent=2))
    if out:
        Path(out).write_text(json.dumps(rates, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
