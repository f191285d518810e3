"""Images per second beside torchdistill, interleaved in one process.

    python -m tests.versus_torchdistill DATA [OUT.json]

resnet56 -> resnet20 at batch 64 with plain kd, the same networks on both sides, fresh weights. torchdistill gets its
usual pipeline: torchvision transforms on PIL images, a DataLoader with one worker a core. Not a test: nothing is
asserted of timings. Needs `pip install torchdistill`.
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

from kd.bench import __main__ as bench
from kd.bench import measure
from kd.bench.measure import Workloads
from kd.data import load_data
from kd.models import build_model
from kd.training.launch import start

STEPS, ROUNDS, BATCH = 10, 5, 64


class Pictures(torch.utils.data.Dataset):
    """The training split as PIL images, as torchvision's own CIFAR100 class holds it, through its transforms."""

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


def their_steps(data):
    """A function that makes the next STEPS steps of torchdistill's own training loop."""
    for module in ("core.interfaces.forward_proc", "losses.high_level", "losses.mid_level", "losses.util"):
        importlib.import_module(f"torchdistill.{module}")  # which is what registers its names
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
    config = measure.BenchConfig(data=source, model="resnet20", teacher_model="resnet56", steps=STEPS)
    job = config.job()
    accelerator, data = start(job.fit, job.run), load_data(job.data)
    with tempfile.TemporaryDirectory() as folder:
        ours = Workloads(job, config.teacher_model, STEPS, data, accelerator).all(Path(folder))
        pieces = {"torchdistill": their_steps(data), "live": ours["live"], "cached": ours["cached"]}
        seconds = bench.take_turns(pieces, ROUNDS, accelerator.device)
    rates = {name: STEPS * BATCH / statistics.median(times) for name, times in seconds.items()}
    theirs = seconds["torchdistill"]
    for name in ("live", "cached"):
        rates[f"{name}_over_torchdistill"] = statistics.median(a / b for a, b in zip(theirs, seconds[name]))
    print(json.dumps(rates, indent=2))
    if out:
        Path(out).write_text(json.dumps(rates, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
