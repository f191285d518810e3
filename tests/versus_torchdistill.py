"""Compare images per second with torchdistill in fp32 and in bf16, interleaved in one process.

    python -m tests.versus_torchdistill DATA
    python -m tests.versus_torchdistill DATA --student resnet18 --teacher resnet34 --batch-size 512 --json OUT.json

Plain KD, the same networks with random weights on both sides. torchdistill uses its usual pipeline: torchvision
transforms on PIL images, a DataLoader with one worker per core. Its own way to half precision is Accelerate's fp16 of
long ago (`AcceleratorState.use_fp16`), which the Accelerate of today lacks; so its bf16 is its own loop with autocast
around the forward pass. Not a test: no timing is asserted. Needs `pip install torchdistill==1.1.5`.
"""

import argparse
import importlib
import json
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image

from kd.bench.__main__ import NAMES, BenchConfig, start_in
from kd.bench.measure import Workload, Workloads, median, middle_half, repeated, shape_of, summarise, time_in_turns
from kd.data import Data, load_data
from kd.models import build_model


class Pictures(torch.utils.data.Dataset):
    """The training split as transformed PIL images, stored as in torchvision's CIFAR100."""

    def __init__(self, data):
        from torchvision import transforms

        self.images, self.labels = data.train.images.permute(0, 2, 3, 1).numpy(), data.train.labels.tolist()
        crop_and_flip = [transforms.RandomCrop(data.size, padding=4), transforms.RandomHorizontalFlip()]
        to_tensor = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
        self.transform = transforms.Compose([*crop_and_flip, *to_tensor])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int):
        return self.transform(Image.fromarray(self.images[row])), self.labels[row]


def torchdistill_steps(config: BenchConfig, data: Data, device: torch.device, precision: str) -> Workload:
    """A window of torchdistill's own training loop."""
    for module in ("core.interfaces.forward_proc", "losses.high_level", "losses.mid_level", "losses.util"):
        importlib.import_module(f"torchdistill.{module}")  # registers its names
    from torchdistill.core.distillation import get_distillation_box

    path = {"student_module_path": ".", "student_module_io": "output"}
    path |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    loader = {"dataset_id": "train", "sampler": {"class_or_func": torch.utils.data.RandomSampler}}
    loader["kwargs"] = {"batch_size": config.batch_size, "num_workers": os.cpu_count(), "drop_last": True}
    network = {"forward_proc": "forward_batch_only", "forward_hook": {"input": [], "output": []}}
    settings = {
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
    names = config.teacher_model, config.model
    networks = (build_model(name, len(data.classes), data.size).to(device) for name in names)
    box = get_distillation_box(*networks, {"train": Pictures(data)}, settings, device, None, False, 1)
    box.pre_epoch_process(epoch=0)
    batches = endless(box.train_data_loader)

    def step() -> None:
        images, labels, extra = next(batches)
        box.pre_forward_process()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = box.forward_process(images.to(device), labels.to(device), extra)
        box.post_forward_process(loss=loss)

    return repeated(step, config.steps)


def endless(loader):
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    for name, default in {"student": "resnet20", "teacher": "resnet56"}.items():
        parser.add_argument(f"--{name}", default=default)
    for name, default in {"batch-size": 64, "steps": 20, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    flags = {name: getattr(asked, name) for name in ("data", "batch_size", "steps", "rounds", "threads")}
    numbers = measure(BenchConfig(model=asked.student, teacher_model=asked.teacher, **flags))
    print(json.dumps(numbers, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(numbers, indent=2) + "\n")


def measure(config: BenchConfig) -> dict:
    """Images per second of both, and how many times as fast kd is, with the range of the middle half of the rounds."""
    sides, data, numbers = {}, load_data(config.job().data), {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in config.precisions:
            accelerator = start_in(precision, config)
            parts = Workloads(config.job(precision), config.teacher_model, config.steps, data, accelerator)
            theirs = torchdistill_steps(config, data, accelerator.device, precision)
            sides[precision] = accelerator, {"torchdistill": theirs} | parts.all(Path(folder) / precision)
        times = time_in_turns(sides, config.rounds)
    for precision, seconds in times.items():
        theirs = [second / config.steps for second in seconds["torchdistill"]]
        ours = summarise(seconds, shape_of(parts))
        rates = {name: ours[f"{name}_images_per_second"] for name in ("bare", "live", "cached")}
        numbers[NAMES[precision]] = {"torchdistill": config.batch_size / median(theirs)} | rates
        for name in ("live", "cached"):
            ratios = [one / other for one, other in zip(theirs, ours[f"{name}_seconds"], strict=True)]
            numbers[NAMES[precision]] |= {
                f"{name}_over_torchdistill": median(ratios),
                f"{name}_range": middle_half(ratios),
            }
    return numbers


if __name__ == "__main__":
    main()
